// One update of a factor, as Python packs it: addresses, sizes and strides (in elements). A mask at address 0 is none.
#pragma once

#include "layout.h"

namespace lk {

struct Gram {  // C += alpha X^T X
  uint64_t c, x, mask;
  int64_t tokens, c_stride, x_stride;
  int32_t d;
  float alpha;
};

struct Sketch {  // Y += alpha X^T (X Omega)
  uint64_t y, x, omega, mask;
  int64_t tokens, y_stride, x_stride, omega_stride;
  int32_t d, m;
  float alpha;
  int32_t unused;  // the struct is a whole number of 8-byte words
};

static_assert(sizeof(Gram) == 56 && sizeof(Sketch) == 80, "laplace_kernels/cuda.py packs these structs");

struct alignas(16) Quad {
  float value[4];
};

// Whether every row of X starts at a multiple of 16 bytes, so that 16 bytes can be copied at once.
LK_FN bool rows_aligned(uint64_t x, int64_t stride) {
  return (x | static_cast<uint64_t>(stride * 2)) % kChunkBytes == 0;
}

// A block's sum, where it ends: written to a plane of its own, or else added to what others add to in any order.
template <class Machine>
LK_FN void put_sum(Machine& machine, float* place, float sum, int64_t plane) {
  if (plane > 0) {
    *place = sum;
  } else {
    machine.add(place, sum);
  }
}

// Sets to 0 the bytes to copy of masked rows: bytes[i] are of row token_of(i). The whole mask is read before any of it
// is looked at, and no read depends on another, so that they overlap.
template <int n, class TokenOf>
LK_FN void drop_masked(int (&bytes)[n], const uint8_t* mask, int64_t tokens, TokenOf token_of) {
  if (mask == nullptr) return;
  uint8_t kept[n];
  LK_UNROLL
  for (int i = 0; i < n; ++i) kept[i] = mask[smaller(token_of(i), tokens - 1)];
  LK_UNROLL
  for (int i = 0; i < n; ++i) bytes[i] = kept[i] != 0 ? bytes[i] : 0;
}

}  // namespace lk
