"""Pruning: scores and masks against naive loops, the smaller model, and the way back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import fedkernels as fk
from fedkernels import pruning
from fedkernels.pruning import LayerPlan, LayerShape, PruningPlan
from fedkernels.reference import pruning as reference

HEADS, KV_HEADS, CHANNELS = 8, 4, 12
SHAPE = LayerShape("layers.0", 16, HEADS, KV_HEADS, 4, CHANNELS)

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**32)


def tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def llama(layers: int = 2, **changes: Any) -> LlamaForCausalLM:
    """A random Llama with grouped queries and biases everywhere that Llama can have them."""
    sizes = dict(
        vocab_size=50, hidden_size=32, intermediate_size=CHANNELS, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, attention_bias=True, mlp_bias=True,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def magnitudes(model: nn.Module) -> dict[str, Tensor]:
    return pruning.layer_scores(
        model, lambda _, linear, sums: pruning.magnitude(linear.weight, sums)
    )


def masked(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """The whole model with all that is dropped set to zero."""
    state = dict(model.named_parameters())
    state = {name: part.detach() for name, part in state.items()}
    whole = copy.deepcopy(model)
    missing = whole.load_state_dict(
        pruning.scatter(pruning.gather(state, plan), plan), strict=False
    )
    assert not missing.unexpected_keys
    return whole


@st.composite
def layer_plans(draw: st.DrawFn, shape: LayerShape = SHAPE) -> LayerPlan:
    kv_heads = sorted(draw(st.sets(st.integers(0, shape.kv_heads - 1), min_size=1)))
    width = draw(st.integers(1, shape.group))
    heads = []
    for kv_head in kv_heads:
        members = st.sets(st.integers(0, shape.group - 1), min_size=width, max_size=width)
        heads += [kv_head * shape.group + member for member in draw(members)]
    channels = sorted(draw(st.sets(st.integers(0, shape.channels - 1), min_size=1)))
    return LayerPlan(
        shape, torch.tensor(sorted(heads)), torch.tensor(kv_heads), torch.tensor(channels)
    )


plans = layer_plans().map(lambda layer: PruningPlan((layer,)))
weights = st.sampled_from(
    PruningPlan((LayerPlan(SHAPE, *map(torch.arange, (8, 4, 12))),)).parameters
)


class TestScores:
    @given(out=sizes, columns=sizes, rank=st.integers(1, 5), seed=seeds)
    def test_each_weight_s_score_is_its_formula(
        self, out: int, columns: int, rank: int, seed: int
    ) -> None:
        w, g, norms = tensor(seed, out, columns), tensor(seed + 1, out, columns), tensor(2, columns)
        b, db = tensor(seed + 3, out, rank), tensor(seed + 4, out, rank)
        a, da = tensor(seed + 5, rank, columns), tensor(seed + 6, rank, columns)
        found = (
            pruning.magnitude(w),
            pruning.wanda(w, norms.abs()),
            pruning.taylor(w, g),
            pruning.lora_gradient(w, b, a, db, da, 2.0),
        )
        i, j = seed % out, seed % columns
        gradient = sum(
            float(db[i, k] * a[k, j] + b[i, k] * da[k, j] - db[i, k] * da[k, j])
            for k in range(rank)
        )
        merged = float(w[i, j]) + 2.0 * sum(float(b[i, k] * a[k, j]) for k in range(rank))
        expected = (
            abs(float(w[i, j])),
            abs(float(w[i, j] * norms[j])),
            abs(float(w[i, j] * g[i, j])),
            (gradient * merged) ** 2,
        )
        assert [float(scores[i, j]) for scores in found] == pytest.approx(expected, 1e-4, 1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_sums_over_several_blocks_agree_with_the_reference(self, dtype: torch.dtype) -> None:
        out, columns, rank = 140, 4000, 3  # a block has 131 rows
        w, g = tensor(0, out, columns).to(dtype), tensor(1, out, columns).to(dtype)
        norms = tensor(2, columns).abs()
        b, db = tensor(3, out, rank), tensor(4, out, rank)
        a, da = tensor(5, rank, columns), tensor(6, rank, columns)
        for whole, scores in (
            (reference.magnitude(w), lambda sums: pruning.magnitude(w, sums)),
            (reference.wanda(w, norms), lambda sums: pruning.wanda(w, norms, sums)),
            (reference.taylor(w, g), lambda sums: pruning.taylor(w, g, sums)),
            (
                reference.lora_gradient(w, b, a, db, da, 0.5),
                lambda sums: pruning.lora_gradient(w, b, a, db, da, 0.5, sums),
            ),
        ):
            torch.testing.assert_close(scores(None), whole, rtol=1e-4, atol=1e-4)
            for sums, dim in (("rows", 1), ("columns", 0)):
                expected = whole.double().sum(dim)
                torch.testing.assert_close(scores(sums), expected, rtol=1e-4, atol=1e-4)

    def test_the_score_of_an_adapter_needs_no_gradient_of_the_weight(self) -> None:
        """With scale 1 and small gradients it is Taylor's score with A's and B's directions."""
        w, b, a = (
            tensor(0, 6, 5),
            tensor(1, 6, 2).requires_grad_(),
            tensor(2, 2, 5).requires_grad_(),
        )
        ((w + b @ a) @ tensor(3, 5, 7)).square().mean().backward()
        assert b.grad is not None
        assert a.grad is not None
        step = 1e-4
        moved = b @ a - (b - step * b.grad) @ (a - step * a.grad)
        scores = pruning.lora_gradient(w, b, a, step * b.grad, step * a.grad)
        torch.testing.assert_close(
            scores, ((w + b @ a) * moved).square().detach(), rtol=0.05, atol=1e-9
        )

    def test_an_adapter_in_training_gives_the_scores_of_its_linears(self) -> None:
        model = llama(1)
        target_modules = ["q_proj", "down_proj", "lm_head"]
        wrapped = get_peft_model(
            model, LoraConfig(r=2, lora_alpha=6, target_modules=target_modules)
        )
        with pytest.raises(ValueError, match="adapter"):
            pruning.adapter_scores(wrapped)
        nn.init.normal_(model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
        tokens = torch.tensor([[3, 1, 4, 1, 5]])
        wrapped(tokens, labels=tokens).loss.backward()
        scores = pruning.adapter_scores(wrapped)
        names = [f"model.layers.0.{name}_proj" for name in ("self_attn.q", "mlp.down")]
        assert list(scores) == [f"{name}.weight" for name in names]
        for name, dim in zip(names, (1, 0), strict=True):
            layer = model.get_submodule(name)
            b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            whole = reference.lora_gradient(
                layer.base_layer.weight, b, a, b.grad, a.grad, scale=3.0
            )
            expected = whole.detach().double().sum(dim)
            torch.testing.assert_close(scores[f"{name}.weight"], expected, rtol=1e-4, atol=1e-7)
        assert all(
            torch.equal(scores[name], part) for name, part in pruning.adapter_scores(model).items()
        )
        plan = pruning.derive_plan(
            pruning.layer_shapes(wrapped.unload()), scores, head_ratio=0.5, channel_ratio=0.5
        )
        assert plan.kept_weights == pytest.approx(0.5)
        with pytest.raises(ValueError, match="adapter"):
            pruning.adapter_scores(model)

    def test_input_norms_are_those_of_all_positions_of_all_batches(self) -> None:
        model = llama(1)
        batches = [torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7, 8]])]
        with pruning.InputNorms(model) as norms, torch.no_grad():
            for batch in batches:
                model(batch)
        hidden = torch.cat([
            model(batch, output_hidden_states=True).hidden_states[-1].reshape(-1, 32)
            for batch in batches
        ]).detach()  # fmt: skip
        torch.testing.assert_close(norms["lm_head"], hidden.square().sum(0).sqrt())
        q, k = (norms[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
        assert torch.equal(q, k)
        model(batches[0])  # closed: nothing is collected any more
        torch.testing.assert_close(norms["lm_head"], hidden.square().sum(0).sqrt())

    def test_averages_move_by_the_rest_of_the_decay(self) -> None:
        first = pruning.moving_average(None, torch.ones(3))
        torch.testing.assert_close(
            pruning.moving_average(first, torch.full((3,), 2.0), 0.75), torch.full((3,), 1.25)
        )


class TestMasks:
    @given(out=st.integers(1, 6), columns=sizes, seed=seeds, ties=st.booleans())
    def test_two_of_every_four_and_they_are_the_largest(
        self, out: int, columns: int, seed: int, ties: bool
    ) -> None:
        scores = tensor(seed, out, columns)
        scores = scores.round() if ties else scores
        mask = pruning.two_of_four_mask(scores)
        for row, kept in zip(scores.tolist(), mask.tolist(), strict=True):
            for start in range(0, columns, 4):
                group = row[start : start + 4]
                best = sorted(range(len(group)), key=lambda i: (-group[i], i))[:2]
                assert {i for i, k in enumerate(kept[start : start + 4]) if k} == set(best)

    @given(
        out=st.integers(1, 6), columns=sizes, seed=seeds, ties=st.booleans(),
        ratio=st.floats(0, 0.999), per=st.sampled_from(["row", "matrix"]),
    )  # fmt: skip
    def test_the_lowest_are_dropped_and_of_equals_the_last(
        self, out: int, columns: int, seed: int, ties: bool, ratio: float, per: str
    ) -> None:
        scores = tensor(seed, out, columns)
        scores = scores.round() if ties else scores
        mask = pruning.unstructured_mask(scores, ratio, per)
        rows = scores if per == "row" else scores.reshape(1, -1)
        for row, kept in zip(rows.tolist(), mask.reshape(rows.shape).tolist(), strict=True):
            keep = len(row) - int(ratio * len(row) + 1e-9)
            best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:keep]
            assert {i for i, k in enumerate(kept) if k} == set(best)

    def test_every_backend_has_the_same_masks(self, backend: str) -> None:
        scores = tensor(3, 520, 1031).mul_(4).round_()  # many equals, several blocks, a ragged end
        assert torch.equal(pruning.two_of_four_mask(scores), reference.two_of_four_mask(scores))
        assert torch.equal(pruning.unstructured_mask(scores, 0.5), reference.top_mask(scores, 516))


class TestPlan:
    @pytest.mark.parametrize("scope", ["layer", "global"])
    @pytest.mark.parametrize("heads", ["groups", "within"])
    @given(seed=seeds, head_ratio=st.floats(0, 0.99), channel_ratio=st.floats(0, 0.99))
    def test_what_is_dropped_has_the_least_scores(
        self, scope: str, heads: str, seed: int, head_ratio: float, channel_ratio: float
    ) -> None:
        shapes = [LayerShape(name, 16, HEADS, KV_HEADS, 4, CHANNELS) for name in "abc"]
        scores = {
            f"{shape.name}.{linear}.weight": tensor(seed + i, shape.weight_shape(linear)[1 - rows])
            for shape in shapes
            for i, (linear, (_, is_rows)) in enumerate(pruning.structure.AXES.items())
            for rows in [int(is_rows)]
        }
        plan = pruning.derive_plan(
            shapes, scores, head_ratio=head_ratio, channel_ratio=channel_ratio,
            scope=scope, heads=heads, minimum_channels=3,
        )  # fmt: skip
        units = HEADS // KV_HEADS if heads == "within" else KV_HEADS
        for total, least, ratio, kept in (
            (CHANNELS, 3, channel_ratio, [layer.channels.numel() for layer in plan.layers]),
            (units, 1, head_ratio,
             [layer.group if heads == "within" else layer.kv_heads.numel() for layer in plan.layers]),
        ):  # fmt: skip
            assert min(kept) >= least
            layers = 1 if scope == "layer" else 3
            wanted = layers * total - int(ratio * layers * total + 1e-9)
            assert sum(kept) == 3 // layers * max(wanted, layers * least)
        for layer in plan.layers:
            if layer.channels.numel() == CHANNELS:
                continue
            values = sum(
                scores[f"{layer.shape.name}.mlp.{name}_proj.weight"].double()
                for name in ("gate", "up", "down")
            )
            dropped = torch.ones(CHANNELS, dtype=torch.bool)
            dropped[layer.channels] = False
            assert values[layer.channels].min() >= values[dropped].max()

    def test_matrices_of_scores_are_summed_along_the_right_axis(self) -> None:
        model = llama()
        shapes, whole = pruning.layer_shapes(model), {}
        for name, parameter in model.named_parameters():
            if name in magnitudes(model):
                whole[name] = parameter.detach().abs()
        for heads in ("groups", "within"):
            one, other = (
                pruning.derive_plan(shapes, scores, head_ratio=0.5, channel_ratio=0.5, heads=heads)
                for scores in (whole, magnitudes(model))
            )
            for mine, theirs in zip(one.layers, other.layers, strict=True):
                for part in ("heads", "kv_heads", "channels"):
                    assert torch.equal(mine.kept(part), theirs.kept(part))

    def test_bad_arguments_are_named(self) -> None:
        shapes = pruning.layer_shapes(llama())
        scores = magnitudes(llama())
        ratios = {"head_ratio": 0.5, "channel_ratio": 0.5}
        q = "model.layers.1.self_attn.q_proj.weight"
        half = {name: part for name, part in scores.items() if ".mlp." in name}
        for name, changes in (
            ("shapes", {"shapes": []}),
            ("head_ratio", {"head_ratio": 1.0}),
            ("head_ratio", {"head_ratio": -0.1}),
            ("channel_ratio", {"channel_ratio": float("nan")}),
            ("scope", {"scope": "model"}),
            ("heads", {"heads": "some"}),
            ("minimum_heads", {"minimum_heads": 0}),
            ("minimum_channels", {"minimum_channels": 0}),
            ("scores", {"scores": half}),
            ("scores", {"scores": {**scores, "lm_head.weight": scores[q]}}),
            ("q_proj", {"scores": {**scores, q: scores[q][:-1]}}),
            ("q_proj", {"scores": {**scores, q: scores[q] * torch.nan}}),
        ):
            arguments: dict[str, Any] = {"shapes": shapes, "scores": scores, **ratios, **changes}
            with pytest.raises(ValueError, match=name):
                pruning.derive_plan(**arguments)

    def test_a_layer_plan_is_valid_or_refused(self) -> None:
        kept = {"heads": [0, 3], "kv_heads": [0, 1], "channels": [5]}
        LayerPlan(SHAPE, *map(torch.tensor, kept.values()))
        for name, indices in (
            ("heads", [0, 1]),  # none of group 1
            ("heads", [0, 1, 2]),  # two of one group, one of the other
            ("heads", [0, 3, 4]),  # one of a group that is dropped
            ("heads", [3, 0]),
            ("heads", [0, 8]),
            ("kv_heads", []),
            ("channels", [-1]),
            ("channels", [2, 2]),
        ):
            changed = {**kept, name: indices}
            parts = (torch.tensor(part, dtype=torch.int64) for part in changed.values())
            with pytest.raises(ValueError, match=name):
                LayerPlan(SHAPE, *parts)
        layer = LayerPlan(SHAPE, *map(torch.tensor, kept.values()))
        with pytest.raises(ValueError, match="layers"):
            PruningPlan((layer, layer))
        assert PruningPlan(()).kept_weights == 1.0


class TestSmallerModel:
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("heads", ["groups", "within"])
    @pytest.mark.parametrize("scope", ["layer", "global"])
    def test_it_computes_what_the_masked_model_does(
        self, heads: str, scope: str, attention: str
    ) -> None:
        model = llama(3, attn_implementation=attention)
        before = {name: part.clone() for name, part in model.state_dict().items()}
        plan = pruning.derive_plan(
            pruning.layer_shapes(model), magnitudes(model),
            head_ratio=0.5, channel_ratio=0.4, heads=heads, scope=scope,
        )  # fmt: skip
        small, whole = pruning.gather(model, plan), masked(model, plan)
        tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
        with torch.no_grad():
            torch.testing.assert_close(small(tokens).logits, whole(tokens).logits)
            assert not torch.allclose(small(tokens).logits, model(tokens).logits, atol=1e-2)
        count = sum(part.numel() for part in small.parameters())
        assert count < sum(part.numel() for part in model.parameters())
        assert all(torch.equal(before[name], part) for name, part in model.state_dict().items())

    def test_it_trains_and_generates_like_the_masked_model(self) -> None:
        model = llama()
        plan = pruning.derive_plan(
            pruning.layer_shapes(model), magnitudes(model), head_ratio=0.5, channel_ratio=0.5
        )
        small, whole = pruning.gather(model, plan), masked(model, plan)
        tokens = torch.tensor([[3, 1, 4, 1, 5]])
        for one in (small, whole):
            one(tokens, labels=tokens).loss.backward()
        gradients = {name: part.grad for name, part in whole.named_parameters()}
        for name, expected in pruning.gather(gradients, plan).items():
            found = small.get_parameter(name).grad
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        generated = [
            one.generate(tokens, max_new_tokens=5, do_sample=False) for one in (small, whole)
        ]
        assert torch.equal(*generated)

    def test_an_adapter_of_it_is_one_of_the_whole_model(self) -> None:
        """Small weights plus a LoRA change, against whole weights plus the scattered factors."""
        model = llama()
        plan = pruning.derive_plan(
            pruning.layer_shapes(model), magnitudes(model),
            head_ratio=0.5, channel_ratio=0.4, heads="within",
        )  # fmt: skip
        small, whole = pruning.gather(model, plan), masked(model, plan)
        factors = {}
        for seed, name in enumerate(magnitudes(model)):
            out, columns = small.get_parameter(name).shape
            factors[name] = 0.1 * tensor(seed, out, 2), tensor(seed + 1, 2, columns), 2.0
        with torch.no_grad():
            for one, changes in (
                (small, factors),
                (whole, pruning.scatter_factors(factors, plan)),
            ):
                for name, (b, a, scale) in changes.items():
                    one.get_parameter(name).add_(scale * b @ a)
            tokens = torch.tensor([[3, 1, 4, 1, 5]])
            torch.testing.assert_close(small(tokens).logits, whole(tokens).logits)

    def test_equal_layers_are_in_the_configuration_and_load_again(self, tmp_path: Path) -> None:
        model = llama()
        plan = pruning.derive_plan(
            pruning.layer_shapes(model), magnitudes(model), head_ratio=0.5, channel_ratio=0.5
        )
        small = pruning.gather(model, plan)
        small.save_pretrained(tmp_path)
        tokens = torch.tensor([[3, 1, 4]])
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(tokens).logits, small(tokens).logits)
        assert model.config.intermediate_size == CHANNELS

    def test_norms_within_a_head_are_no_obstacle(self) -> None:
        model = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=50, hidden_size=32, intermediate_size=12, num_hidden_layers=1, head_dim=8,
            num_attention_heads=4, num_key_value_heads=2,
            pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )).eval()  # fmt: skip
        plan = pruning.derive_plan(
            pruning.layer_shapes(model), magnitudes(model), head_ratio=0.5, channel_ratio=0.5
        )
        tokens = torch.tensor([[3, 1, 4]])
        found, expected = pruning.gather(model, plan)(tokens), masked(model, plan)(tokens)
        torch.testing.assert_close(found.logits, expected.logits)

    def test_other_architectures_are_refused_with_the_reason(self) -> None:
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2))
        small = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 8}
        mixtral = MixtralForCausalLM(MixtralConfig(
            **small, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            num_local_experts=2, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        ))  # fmt: skip
        quantised, adapted, sinks = llama(), llama(), llama()
        quantised.model.layers[1].mlp.up_proj.__class__ = type("QuantizedLinear", (nn.Linear,), {})
        adapted.model.layers[0].self_attn.q_proj.base_layer = nn.Linear(1, 1)
        sinks.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(HEADS))
        for model, reason in (
            (gpt2, "Conv1D"),
            (mixtral, "gate_proj"),
            (nn.Linear(2, 2), "self_attn"),
            (quantised, "QuantizedLinear"),
            (adapted, "adapter"),
            (sinks, "sinks"),
        ):
            with pytest.raises(ValueError, match=reason):
                pruning.layer_shapes(model)

    def test_a_replaced_forward_pass_is_refused(self) -> None:
        model = llama()
        plan = pruning.derive_plan(
            pruning.layer_shapes(model), magnitudes(model), head_ratio=0.5, channel_ratio=0.5
        )
        model.model.norm.forward = lambda x: x
        with pytest.raises(ValueError, match=r"model\.norm"):
            pruning.gather(model, plan)

    def test_a_plan_for_another_model_is_refused(self) -> None:
        layer = LayerPlan(SHAPE, torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))
        with pytest.raises(ValueError, match="plan"):
            pruning.gather(llama(), PruningPlan((layer,)))


class TestScatter:
    @given(plan=plans, name=weights, seed=seeds)
    def test_kept_stays_and_the_rest_is_zero(self, plan: PruningPlan, name: str, seed: int) -> None:
        indices = plan.indices(name)
        assert indices is not None
        whole = {name: tensor(seed, *indices.shape)}
        small = pruning.gather(whole, plan)
        back = pruning.scatter(small, plan)
        assert small[name].shape == indices.kept_shape
        assert torch.equal(pruning.gather(back, plan)[name], small[name])
        kept = pruning.scatter({name: torch.ones(indices.kept_shape)}, plan)[name]
        assert torch.equal(back[name], whole[name] * kept)
        assert int(kept.sum()) == small[name].numel()

    @given(plan=plans, name=weights.filter(lambda name: name.endswith("weight")), seed=seeds)
    def test_the_change_of_scattered_factors_is_the_scattered_change(
        self, plan: PruningPlan, name: str, seed: int
    ) -> None:
        indices = plan.indices(name)
        assert indices is not None
        out, columns = indices.kept_shape
        factors = {name: (tensor(seed, out, 3), tensor(seed + 1, 3, columns), 0.5)}
        b, a, scale = pruning.scatter_factors(factors, plan)[name]
        change = {name: 0.5 * factors[name][0] @ factors[name][1]}
        torch.testing.assert_close(scale * b @ a, pruning.scatter(change, plan)[name])
        again = pruning.gather_factors({name: (b, a, scale)}, plan)[name]
        assert torch.equal(again[0], factors[name][0])
        assert torch.equal(again[1], factors[name][1])

    @given(plan=plans, name=weights, seed=st.integers(0, 2**64 - 1))
    def test_a_pruned_node_s_probe_is_the_restriction_of_everybody_s(
        self, plan: PruningPlan, name: str, seed: int
    ) -> None:
        """Element by element: the probe of the scattered place, in the whole tensor's order."""
        indices = plan.indices(name)
        assert indices is not None
        probe = fk.noise(seed, 7, indices.shape)
        small = pruning.gather({name: probe}, plan)[name]
        columns = indices.shape[1] if len(indices.shape) == 2 else 1
        rows = range(indices.shape[0]) if indices.rows is None else indices.rows.tolist()
        along = range(columns) if indices.columns is None else indices.columns.tolist()
        flat = probe.reshape(-1)
        assert small.reshape(-1).tolist() == [
            float(flat[i * columns + j]) for i in rows for j in along
        ]

    def test_what_the_plan_does_not_name_is_passed_on(self) -> None:
        plan = PruningPlan((LayerPlan(SHAPE, *map(torch.arange, (8, 4, 12))),))
        norm, factors = torch.ones(3), (torch.ones(3, 1), torch.ones(1, 3), 1.0)
        assert pruning.gather({"norm": norm}, plan)["norm"] is norm
        assert pruning.scatter({"norm": norm}, plan)["norm"] is norm
        assert pruning.scatter_factors({"embed": factors}, plan)["embed"] == factors

    def test_other_shapes_are_refused_by_name(self) -> None:
        plan = PruningPlan(
            (LayerPlan(SHAPE, torch.tensor([0]), torch.tensor([0]), torch.arange(3)),)
        )
        up, bias = "layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.bias"
        for call in (
            lambda: pruning.gather({up: torch.ones(3, 16)}, plan),
            lambda: pruning.scatter({up: torch.ones(12, 16)}, plan),
            lambda: pruning.scatter_factors(
                {up: (torch.ones(12, 1), torch.ones(1, 16), 1.0)}, plan
            ),
            lambda: pruning.gather_factors({up: (torch.ones(3, 1), torch.ones(1, 16), 1.0)}, plan),
            lambda: pruning.scatter_factors({up: (torch.ones(3, 2), torch.ones(1, 16), 1.0)}, plan),
            lambda: pruning.scatter_factors(
                {bias: (torch.ones(3, 1), torch.ones(1, 1), 1.0)}, plan
            ),
        ):
            with pytest.raises(ValueError, match="up_proj"):
                call()


class TestBadInput:
    def test_scores_name_the_argument(self) -> None:
        w = torch.ones(4, 6)
        factors = {
            "b": torch.ones(4, 2), "a": torch.ones(2, 6),
            "b_gradient": torch.ones(4, 2), "a_gradient": torch.ones(2, 6),
        }  # fmt: skip
        for bad in (torch.ones(4), torch.ones(0, 6), torch.ones(4, 6, dtype=torch.int32)):
            with pytest.raises(ValueError, match="weight"):
                pruning.magnitude(bad)
        with pytest.raises(ValueError, match="sums"):
            pruning.magnitude(w, "all")
        for bad in (
            torch.ones(4),
            torch.ones(6, 1),
            torch.ones(6).int(),
            torch.ones(6, device="meta"),
        ):
            with pytest.raises(ValueError, match="input_norms"):
                pruning.wanda(w, bad)
        with pytest.raises(ValueError, match="gradient"):
            pruning.taylor(w, torch.ones(6, 4))
        for name in factors:
            with pytest.raises(ValueError, match=name):
                pruning.lora_gradient(w, **{**factors, name: torch.ones(3, 3)})
        for decay in (-0.1, 1.0, float("nan")):
            with pytest.raises(ValueError, match="decay"):
                pruning.moving_average(None, w, decay)
        with pytest.raises(ValueError, match="previous"):
            pruning.moving_average(torch.ones(3), w)

    def test_masks_name_the_argument(self) -> None:
        good = torch.ones(2, 4)
        for bad in (
            torch.ones(4), torch.ones(2, 0), good.int(), good * torch.nan, good * torch.inf,
        ):  # fmt: skip
            with pytest.raises(ValueError, match="scores"):
                pruning.two_of_four_mask(bad)
            with pytest.raises(ValueError, match="scores"):
                pruning.unstructured_mask(bad, 0.5)
        for ratio in (1.0, -0.5, float("nan")):
            with pytest.raises(ValueError, match="ratio"):
                pruning.unstructured_mask(good, ratio)
        with pytest.raises(ValueError, match="per"):
            pruning.unstructured_mask(good, 0.5, "column")

    def test_input_norms_that_were_not_collected_or_not_finite_are_refused(self) -> None:
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        with pruning.InputNorms(model) as norms:
            model[0](torch.full((1, 2), torch.nan))
        for name in "01x":
            with pytest.raises(ValueError, match="name"):
                norms[name]
        with pytest.raises(ValueError, match="model"):
            pruning.InputNorms(nn.ReLU())
