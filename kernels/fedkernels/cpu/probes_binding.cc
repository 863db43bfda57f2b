#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "philox.h"
#include "probes.h"
#include "threads.h"
#include "tiles.h"

#define FK_DECLARE(isa)                          \
  namespace fedkernels {                         \
  namespace isa {                                \
  extern const PerturbKernels kPerturbKernels;   \
  extern const ReplayKernels kReplayKernels;     \
  extern const ProjectKernels kProjectKernels;   \
  }                                              \
  }
FK_DECLARE(portable)
#if defined(FK_HAS_X86)
FK_DECLARE(avx2)
FK_DECLARE(avx512)
FK_DECLARE(avx512vpopcntdq)
#endif
#if defined(FK_HAS_NEON)
FK_DECLARE(neon)
#endif

namespace fedkernels {
namespace {

struct Kernels {
  const PerturbKernels& perturb;
  const ReplayKernels& replay;
  const ProjectKernels& project;
};

Kernels kernels(Isa isa) {
  switch (isa) {
#if defined(FK_HAS_X86)
    case Isa::avx2:
      return {avx2::kPerturbKernels, avx2::kReplayKernels, avx2::kProjectKernels};
    case Isa::avx512:
      if (has_avx512_vpopcntdq()) {
        return {avx512vpopcntdq::kPerturbKernels, avx512vpopcntdq::kReplayKernels,
                avx512vpopcntdq::kProjectKernels};
      }
      return {avx512::kPerturbKernels, avx512::kReplayKernels, avx512::kProjectKernels};
#endif
#if defined(FK_HAS_NEON)
    case Isa::neon:
      return {neon::kPerturbKernels, neon::kReplayKernels, neon::kProjectKernels};
#endif
    default:
      return {portable::kPerturbKernels, portable::kReplayKernels, portable::kProjectKernels};
  }
}

using Gather = std::optional<nb::ndarray<>>;

// A tensor of weights, and where its elements stand in the whole.
struct Weights {
  void* data;
  Dtype dtype;
  std::int64_t count;
};

Weights weights(const nb::ndarray<>& array, const char* name) {
  check_contiguous_cpu(array, name);
  Dtype dtype;
  const nb::dlpack::dtype found = array.dtype();
  if (found == nb::dtype<float>()) {
    dtype = Dtype::float32;
  } else if (found.bits == 16 && found.lanes == 1 &&
             found.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat)) {
    dtype = Dtype::bfloat16;
  } else if (found.bits == 16 && found.lanes == 1 &&
             found.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float)) {
    dtype = Dtype::float16;
  } else {
    refuse(name, "must be float32, bfloat16 or float16");
  }
  return {array.data(), dtype, static_cast<std::int64_t>(array.size())};
}

Stream stream_of(int probe, std::uint64_t tensor_id, std::int64_t width) {
  if (probe < 0 || probe > 3) refuse("probe", "names no probe");
  if (width < 1) refuse("width", "must be positive");
  return {static_cast<Probe>(probe), tensor_id, width};
}

// The tiles of `count` weights; every element that they name is one of these.
std::vector<Tile> checked_tiles(const nb::ndarray<>& pieces, const Gather& gather,
                                std::int64_t count) {
  const std::int64_t* p = elements<std::int64_t>(pieces, "pieces", "int64");
  if (pieces.ndim() != 2 || pieces.shape(1) != 3) refuse("pieces", "must have shape [P, 3]");
  const std::int64_t* places = nullptr;
  std::int64_t held = 0;
  if (gather) {
    places = elements<std::int64_t>(*gather, "gather", "int64");
    held = static_cast<std::int64_t>(gather->size());
    for (std::int64_t i = 0; i < held; ++i) {
      if (places[i] < 0 || (i > 0 && places[i] <= places[i - 1])) {
        refuse("gather", "must increase from 0");
      }
    }
  }
  for (std::size_t i = 0; i < pieces.shape(0); ++i) {
    const std::int64_t local = p[3 * i], first = p[3 * i + 1], length = p[3 * i + 2];
    const std::int64_t here = gather ? held : length;
    if (local < 0 || first < 0 || length < 0 || here > count || local > count - here ||
        first > (std::int64_t{1} << 62) - length || (held > 0 && places[held - 1] >= length)) {
      refuse("pieces", "must lie inside the weight and the whole");
    }
  }
  return tiles(p, static_cast<std::int64_t>(pieces.shape(0)), places, held);
}

const std::uint64_t* seeds_of(const nb::ndarray<>& seeds) {
  const std::int64_t* data = elements<std::int64_t>(seeds, "seeds", "int64");
  if (seeds.size() == 0) refuse("seeds", "must not be empty");
  return reinterpret_cast<const std::uint64_t*>(data);
}

void perturb(const nb::ndarray<>& out, const Gather& weight, const nb::ndarray<>& pieces,
             const Gather& gather, std::int64_t width, std::uint64_t seed, std::uint64_t tensor_id,
             int probe, float step, int isa, int threads) {
  const Weights to = weights(out, "out");
  const void* from = nullptr;
  if (weight) {
    const Weights source = weights(*weight, "weight");
    if (source.dtype != to.dtype || source.count != to.count) refuse("weight", "must be like out");
    from = source.data;
  }
  const Stream stream = stream_of(probe, tensor_id, width);
  const PerturbKernels& table = kernels(checked_isa(isa)).perturb;
  const std::vector<Tile> work = checked_tiles(pieces, gather, to.count);
  const nb::gil_scoped_release unlocked;
  parallel_for(static_cast<std::int64_t>(work.size()), 16, threads,
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   table.perturb(to.data, from, to.dtype, work[i], stream, seed, step);
                 }
               });
}

void replay(const nb::ndarray<>& weight, const nb::ndarray<>& pieces, const Gather& gather,
            std::int64_t width, const nb::ndarray<>& seeds, const nb::ndarray<>& coefficients,
            double factor, std::uint64_t tensor_id, int probe, int isa, int threads) {
  const Weights to = weights(weight, "weight");
  const Stream stream = stream_of(probe, tensor_id, width);
  const ReplayKernels& table = kernels(checked_isa(isa)).replay;
  const std::uint64_t* keys = seeds_of(seeds);
  const std::int32_t* c = elements<std::int32_t>(coefficients, "coefficients", "int32");
  const std::int64_t count = static_cast<std::int64_t>(seeds.size());
  if (coefficients.size() != seeds.size()) refuse("coefficients", "must be as many as seeds");
  std::uint64_t magnitude = 0;  // the largest |sum_k c_k q_k| that can be
  for (std::int64_t k = 0; k < count; ++k) {
    magnitude += static_cast<std::uint64_t>(c[k] < 0 ? -std::int64_t{c[k]} : std::int64_t{c[k]});
  }
  if (stream.probe == Probe::popcount) magnitude *= 16;
  const bool wide = magnitude >= std::uint64_t{1} << 31;
  const std::vector<Tile> work = checked_tiles(pieces, gather, to.count);
  const nb::gil_scoped_release unlocked;
  parallel_for(static_cast<std::int64_t>(work.size()), 1, threads,
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   table.replay(to.data, to.dtype, work[i], stream, keys, c, count, factor, wide);
                 }
               });
}

void project(const nb::ndarray<>& out, const nb::ndarray<>& delta, const nb::ndarray<>& pieces,
             const Gather& gather, std::int64_t width, const nb::ndarray<>& seeds,
             std::uint64_t tensor_id, int probe, int isa, int threads) {
  double* result = elements<double>(out, "out", "float64");
  const Weights from = weights(delta, "delta");
  const Stream stream = stream_of(probe, tensor_id, width);
  const ProjectKernels& table = kernels(checked_isa(isa)).project;
  const std::uint64_t* keys = seeds_of(seeds);
  const std::int64_t count = static_cast<std::int64_t>(seeds.size());
  if (out.size() != seeds.size()) refuse("out", "must have one element a seed");
  const std::vector<Tile> work = checked_tiles(pieces, gather, from.count);
  const nb::gil_scoped_release unlocked;
  // Sums of chunks, which are then added in order: chunks depend on the tensor, never on the threads.
  const std::int64_t total = static_cast<std::int64_t>(work.size());
  const std::int64_t span = total / 128 + 1;  // tiles of a chunk
  const std::int64_t chunks = (total + span - 1) / span;
  std::vector<double> sums(static_cast<std::size_t>(chunks * count), 0.0);
  parallel_for(chunks, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t chunk = begin; chunk < end; ++chunk) {
      const std::int64_t past = (chunk + 1) * span < total ? (chunk + 1) * span : total;
      for (std::int64_t i = chunk * span; i < past; ++i) {
        table.project(sums.data() + chunk * count, from.data, from.dtype, work[i], stream, keys,
                      count);
      }
    }
  });
  for (std::int64_t k = 0; k < count; ++k) result[k] = 0.0;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (std::int64_t k = 0; k < count; ++k) result[k] += sums[chunk * count + k];
  }
}

}  // namespace

void bind_probes(nb::module_& m) {
  m.def("perturb", &perturb, nb::arg("out").noconvert(), nb::arg("weight").none(),
        nb::arg("pieces").noconvert(), nb::arg("gather").none(), nb::arg("width"), nb::arg("seed"),
        nb::arg("tensor_id"), nb::arg("probe"), nb::arg("step"), nb::arg("isa"), nb::arg("threads"),
        "Write fma(q, step, weight) into out; weight None is zero, and may be out.");
  m.def("replay", &replay, nb::arg("weight").noconvert(), nb::arg("pieces").noconvert(),
        nb::arg("gather").none(), nb::arg("width"), nb::arg("seeds").noconvert(),
        nb::arg("coefficients").noconvert(), nb::arg("factor"), nb::arg("tensor_id"),
        nb::arg("probe"), nb::arg("isa"), nb::arg("threads"),
        "Add factor * sum_k coefficients[k] q_k to the weight, with one rounding.");
  m.def("project", &project, nb::arg("out").noconvert(), nb::arg("delta").noconvert(),
        nb::arg("pieces").noconvert(), nb::arg("gather").none(), nb::arg("width"),
        nb::arg("seeds").noconvert(), nb::arg("tensor_id"), nb::arg("probe"), nb::arg("isa"),
        nb::arg("threads"), "Write <delta, q_k> of each seed into out.");
  m.def("philox4x32", &philox4x32, nb::arg("counter"), nb::arg("key"),
        "Return the four words of Philox4x32-10 at a counter under a key.");
}

}  // namespace fedkernels
