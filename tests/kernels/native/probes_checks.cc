#include "checks.h"
#include "probes.h"
#include "tiles.h"

FK_DECLARE(PerturbKernels, kPerturbKernels)
FK_DECLARE(ReplayKernels, kReplayKernels)

namespace checks {
namespace {

using fedkernels::Dtype;
using fedkernels::Probe;

struct NamedProbe {
  const char* noise;
  const char* perturb;
  const char* replay;
  Probe probe;
};
constexpr NamedProbe all[] = {
    {"rademacher noise", "rademacher perturb", "rademacher replay", Probe::rademacher},
    {"popcount noise", "popcount perturb", "popcount replay", Probe::popcount},
    {"gaussian noise", "gaussian perturb", "gaussian replay", Probe::gaussian},
    {"rank1 noise", "rank1 perturb", "rank1 replay", Probe::rank1}};

// Finite in every type: the exponent's bits are never all set.
std::vector<std::uint16_t> halves(Numbers& numbers, std::size_t count) {
  std::vector<std::uint16_t> values(count);
  for (auto& value : values) value = static_cast<std::uint16_t>(numbers.word() & 0xBBFFu);
  return values;
}

}  // namespace

void probes(fedkernels::Isa isa) {
  const fedkernels::PerturbKernels& perturb = FK_TABLE(isa, kPerturbKernels);
  const fedkernels::ReplayKernels& replay = FK_TABLE(isa, kReplayKernels);
  Numbers numbers(1);
  for (const NamedProbe& named : all) {
    for (int i = 0; i < kCases; ++i) {
      const std::int64_t width = numbers.between(1, 300), rows = numbers.between(1, 40);
      const std::size_t count = static_cast<std::size_t>(rows * width);
      const fedkernels::Stream stream{named.probe, numbers.word() >> 1, width};
      // A stretch that begins inside the tensor, for the dense probes and rank1 alike.
      const std::int64_t piece[3] = {0, numbers.between(0, 5000),
                                     static_cast<std::int64_t>(count)};
      const auto tiles = fedkernels::tiles(piece, 1, nullptr, 0);
      std::vector<float> weights(count);
      for (float& weight : weights) weight = numbers.number();
      const std::uint64_t seed = numbers.word();
      const float step = numbers.number();

      std::vector<float> out(count);
      for (const auto& tile : tiles) {
        perturb.perturb(out.data(), nullptr, Dtype::float32, tile, stream, seed, 1.0f);
      }
      report(named.noise, i, digest(out));
      for (const auto& tile : tiles) {
        perturb.perturb(out.data(), weights.data(), Dtype::float32, tile, stream, seed, step);
      }
      report(named.perturb, i, digest(out));

      std::uint64_t seeds[9];
      std::int32_t coefficients[9];
      const std::int64_t used = numbers.between(1, 9);
      const bool wide = numbers.between(0, 1) == 1;
      for (int k = 0; k < 9; ++k) {
        seeds[k] = numbers.word();
        coefficients[k] = static_cast<std::int32_t>(numbers.between(-100000, 100000));
      }
      auto short_weights = halves(numbers, count);
      const Dtype dtype = i % 2 ? Dtype::bfloat16 : Dtype::float16;
      for (const auto& tile : tiles) {
        replay.replay(weights.data(), Dtype::float32, tile, stream, seeds, coefficients, used,
                      0x1p-20, wide);
        replay.replay(short_weights.data(), dtype, tile, stream, seeds, coefficients, used, 0x1p-20,
                      wide);
      }
      report(named.replay, i, digest(weights) ^ digest(short_weights));
    }
  }
}

}  // namespace checks
