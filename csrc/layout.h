// Index arithmetic of the kernels: plain functions of integers, the same on device and host.
//
// tests/cuda compiles this file with the host compiler and checks every map against brute force.
#pragma once

#include <cmath>
#include <cstdint>

#include "element.h"

namespace lk {

LK_FN constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LK_FN constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Shared memory tiles -------------------------------------------------------------------------------------
// A panel is a tile of rows of 64 elements (128 bytes). The 16-byte chunks of a row are permuted by the row number,
// so that neither reading along rows nor along columns conflicts. It is the 128-byte swizzle of the tensor cores'
// descriptors: one panel serves as an operand and as its transpose. A panel starts at a multiple of 1024 bytes.

constexpr int kPanelColumns = 64;
constexpr int kRowBytes = 128;
constexpr int kChunkBytes = 16;
constexpr int kChunkElements = 8;

LK_FN constexpr uint32_t swizzled(uint32_t row, uint32_t byte) { return row * kRowBytes + (byte ^ (row & 7) << 4); }

// Bytes of a 16-byte chunk at `column` that exist when columns end at `last`; the rest is filled with zeros.
LK_FN constexpr int chunk_bytes(int64_t column, int64_t last, int element_bytes) {
  const int64_t bytes = (last - column) * element_bytes;
  return bytes <= 0 ? 0 : static_cast<int>(smaller(bytes, kChunkBytes));
}

// Descriptor of a panel, or of a part that starts inside it, for wgmma: start address, stride of 1024 bytes from 8
// rows to the next 8 rows, 128-byte swizzle. It reads the same whether the rows run along M or N (K-major) or along K
// (MN-major), as long as the operand is no more than 64 elements wide, so that the other stride is never used.
LK_FN constexpr uint64_t panel_descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

// ---- Fragments -----------------------------------------------------------------------------------------------
// An accumulator of M = 64 (wgmma, 128 threads) or 16 (mma.sync, 32 threads) rows: `index` counts a thread's
// registers, four for every 8 columns. Eight of them, rounded and packed in pairs, are the left operand of the next
// product over 16 columns: registers 2i and 2i + 1 make word i. No data moves between threads.

LK_FN constexpr int fragment_row(int thread, int index) {
  return thread / 32 % 4 * 16 + thread % 32 / 4 + index / 2 % 2 * 8;
}
LK_FN constexpr int fragment_column(int thread, int index) { return index / 4 * 8 + thread % 4 * 2 + index % 2; }

// Where a lane points ldmatrix.x4 in a panel, as (row, column) relative to the fragment.
struct Position {
  int row, column;
};
// Left operand [16, 16], rows of the panel along M.
LK_FN constexpr Position left_position(int lane) { return {lane % 16, lane / 16 * 8}; }
// Left operand [16, 16], rows of the panel along K: transposed on the way.
LK_FN constexpr Position left_transposed_position(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8}; }
// Right operand [16, 16], two of 8 columns, rows of the panel along K: transposed on the way.
LK_FN constexpr Position right_position(int lane) { return {lane % 16, lane / 16 * 8}; }

// ---- Cluster: who holds which columns, who sums which part of Z ------------------------------------------------

// Columns of X per block of the cluster, in whole panels.
LK_FN constexpr int64_t columns_per_rank(int64_t d, int ranks) {
  return ceil_div(ceil_div(d, kPanelColumns), ranks) * kPanelColumns;
}

// Z^T [64 k, tokens] travels as it lies in registers. A unit is four consecutive registers of one thread.
LK_FN constexpr int unit_of(int quad, int thread, int threads) { return quad * threads + thread; }
// The block that sums a unit, and the unit's place there.
LK_FN constexpr int unit_owner(int unit, int units, int ranks) { return unit / (units / ranks); }
LK_FN constexpr int unit_slot(int unit, int units, int ranks) { return unit % (units / ranks); }

// ---- Lower triangle --------------------------------------------------------------------------------------------

LK_FN constexpr int64_t triangle(int64_t n) { return n * (n + 1) / 2; }

// Tile `index` of the lower triangle, counted row by row: (0,0) (1,0) (1,1) (2,0) ...
LK_FN Position lower_tile(int64_t index) {
  int64_t row = static_cast<int64_t>((sqrtf(8.0f * static_cast<float>(index) + 1.0f) - 1.0f) * 0.5f);
  while (triangle(row) > index) --row;  // the root is rounded: correct it in both directions
  while (triangle(row + 1) <= index) ++row;
  return {static_cast<int>(row), static_cast<int>(index - triangle(row))};
}

// Tokens [first, last) of part `part` of `parts`, in whole steps.
struct Range {
  int64_t first, last;
};
LK_FN constexpr Range part_of(int64_t tokens, int part, int parts, int step) {
  const int64_t size = ceil_div(ceil_div(tokens, parts), step) * step;
  return {smaller(part * size, tokens), smaller((part + 1) * size, tokens)};
}

}  // namespace lk
