// Codes to weights and weights to codes.
#include "quantized_expand.h"

namespace fedkernels {
namespace FK_ISA {
namespace {

void to_float32(const QuantizedMatrix& matrix, i64 first, i64 past, float* out) {
  expand(matrix, first, past, out);
}

void to_bfloat16(const QuantizedMatrix& matrix, i64 first, i64 past, std::uint16_t* out) {
  expand(matrix, first, past, out);
}

void range(const float* values, i64 count, float* low, float* high) {
  float least = values[0], most = values[0];
  for (i64 i = 1; i < count; ++i) {
    least = values[i] < least ? values[i] : least;
    most = values[i] > most ? values[i] : most;
  }
  *low = least;
  *high = most;
}

// To the nearest integer, ties to even, for values below 2**22: the sum has no room for a fraction.
inline float rounded_to_integer(float value) { return (value + 12582912.0f) - 12582912.0f; }

constexpr i64 kPiece = 64;

// Packs codes 0 .. 15, one an int, two to a byte; an odd last one stands alone in the high bits.
inline void pack(const std::int32_t* codes, i64 count, std::uint8_t* out) {
  for (i64 i = 0; i + 1 < count; i += 2) {
    out[i / 2] = static_cast<std::uint8_t>(codes[i] << 4 | codes[i + 1]);
  }
  if (count % 2) out[count / 2] = static_cast<std::uint8_t>(codes[count - 1] << 4);
}

void encode_table(const float* values, i64 count, const float* borders, float inverse,
                  std::uint8_t* codes) {
  for (i64 start = 0; start < count; start += kPiece) {
    const i64 size = count - start < kPiece ? count - start : kPiece;
    std::int32_t found[kPiece];
    for (i64 i = 0; i < size; ++i) {
      const float value = values[start + i] * inverse;
      std::int32_t code = 0;
      for (int j = 0; j < 15; ++j) code += value > borders[j];
      found[i] = code;
    }
    pack(found, size, codes + start / 2);
  }
}

void encode_steps(const float* values, i64 count, float minimum, float inverse, std::uint8_t* codes) {
  for (i64 start = 0; start < count; start += kPiece) {
    const i64 size = count - start < kPiece ? count - start : kPiece;
    std::int32_t found[kPiece];
    for (i64 i = 0; i < size; ++i) {
      float value = (values[start + i] - minimum) * inverse;
      value = value < 0.0f ? 0.0f : value;
      value = value > 15.0f ? 15.0f : value;
      found[i] = static_cast<std::int32_t>(rounded_to_integer(value));
    }
    pack(found, size, codes + start / 2);
  }
}

void encode_int8(const float* values, i64 count, float inverse, std::int8_t* codes) {
  for (i64 i = 0; i < count; ++i) {
    float value = values[i] * inverse;
    value = value < -127.0f ? -127.0f : value;
    value = value > 127.0f ? 127.0f : value;
    codes[i] = static_cast<std::int8_t>(rounded_to_integer(value));
  }
}

}  // namespace

extern const QuantizedKernels kQuantizedKernels;
const QuantizedKernels kQuantizedKernels = {to_float32,   to_bfloat16,  range,
                                            encode_table, encode_steps, encode_int8};

}  // namespace FK_ISA
}  // namespace fedkernels
