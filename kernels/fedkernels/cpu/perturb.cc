// weight + step * q in one pass (../reference/replay.py): a probe of bits is a choice of sign.
#include "probe_values.h"

namespace fedkernels {
namespace FK_ISA {
namespace {

// signed_step[i] = q_i * step for the 32 elements of a word
inline void add_signed(float* out, const float* in, std::uint32_t word, std::uint32_t step) {
  for (std::uint32_t i = 0; i < 32; ++i) {
    out[i] = in[i] + float_of(step ^ ((word << (31 - i)) & 0x80000000u));
  }
}

void perturb_bits(float* out, const float* in, const Tile& tile, const std::uint32_t* words,
                  float step) {
  const std::uint32_t bits = bits_of(step);
  std::int64_t place = tile.first - aligned(tile.first), i = 0;
  if (tile.gather == nullptr) {
    for (; i < tile.held && (place + i) % 32 != 0; ++i) {
      const std::uint32_t sign = words[(place + i) / 32] << (31 - (place + i) % 32);
      out[i] = in[i] + float_of(bits ^ (sign & 0x80000000u));
    }
    for (; i + 32 <= tile.held; i += 32) add_signed(out + i, in + i, words[(place + i) / 32], bits);
  }
  for (; i < tile.held; ++i) {
    const std::int64_t p = place + (tile.gather == nullptr ? i : tile.gather[i] - tile.origin);
    out[i] = in[i] + float_of(bits ^ ((words[p / 32] << (31 - p % 32)) & 0x80000000u));
  }
}

void perturb(void* out, const void* weight, Dtype dtype, const Tile& tile, const Stream& stream,
             std::uint64_t seed, float step) {
  alignas(64) float buffer[kTile];
  const float* in = buffer;
  float* result = buffer;
  if (weight == nullptr) {
    std::memset(buffer, 0, tile.held * sizeof(float));
  } else if (dtype == Dtype::float32) {
    in = static_cast<const float*>(weight) + tile.local;
  } else {
    load(buffer, weight, dtype, tile.local, tile.held);
  }
  if (dtype == Dtype::float32) result = static_cast<float*>(out) + tile.local;
  if (is_bits(stream)) {
    std::uint32_t words[kWordRoom];
    tile_bits(seed, stream, tile, words);
    perturb_bits(result, in, tile, words, step);
  } else {
    alignas(64) float values[kValueRoom];
    tile_values(seed, stream, tile, values);
    const float* q = tile_held(values, tile);
    for (std::int64_t i = 0; i < tile.held; ++i) result[i] = fma_(q[i], step, in[i]);
  }
  if (dtype != Dtype::float32) store(out, result, dtype, tile.local, tile.held);
}

}  // namespace

extern const PerturbKernels kPerturbKernels;
const PerturbKernels kPerturbKernels = {perturb};

}  // namespace FK_ISA
}  // namespace fedkernels
