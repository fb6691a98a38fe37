// What the portable kernels share: 64 x 64 tiles of X in shared memory, and 64 x 64 results in the registers of four
// warps, two by two. One thread block has 128 threads.
#pragma once

#include "layout.h"
#include "updates.h"

namespace lk {

constexpr int kTile = 64;
constexpr int kTileThreads = 128;
constexpr int kTileStages = 3;
constexpr uint32_t kTileBytes = kTile * kRowBytes;
static_assert(kTile == kPanelColumns, "a tile of X is one swizzled panel");

// Rows of 16-bit elements, some of them masked.
struct Rows {
  const uint16_t* x;
  const uint8_t* mask;
  int64_t stride, last_token;
  int64_t last_column;
  bool aligned;

  LK_FN Rows(uint64_t x_address, uint64_t mask_address, int64_t row_stride, int64_t tokens, int64_t columns)
      : x(reinterpret_cast<const uint16_t*>(x_address)),
        mask(reinterpret_cast<const uint8_t*>(mask_address)),
        stride(row_stride),
        last_token(tokens),
        last_column(columns),
        aligned(rows_aligned(x_address, row_stride)) {}
};

// Copies the tile at (token, column) to shared memory. What is masked or outside becomes zeros and is not read.
template <class Machine>
LK_FN void load_tile(Machine& machine, uint32_t to, const Rows& rows, int64_t token0, int64_t column0) {
  constexpr int kCopies = kTile * 8 / kTileThreads;
  auto chunk_of = [&](int i) { return machine.thread() + i * kTileThreads; };
  auto token_of = [&](int i) { return token0 + chunk_of(i) / 8; };
  int bytes[kCopies];
  LK_UNROLL
  for (int i = 0; i < kCopies; ++i) {
    const int64_t column = column0 + chunk_of(i) % 8 * kChunkElements;
    bytes[i] = token_of(i) < rows.last_token ? chunk_bytes(column, rows.last_column, 2) : 0;
  }
  drop_masked(bytes, rows.mask, rows.last_token, token_of);
  LK_UNROLL
  for (int i = 0; i < kCopies; ++i) {
    const int row = chunk_of(i) / 8, place = chunk_of(i) % 8;
    const uint16_t* from =
        bytes[i] > 0 ? rows.x + (token0 + row) * rows.stride + column0 + place * kChunkElements : rows.x;
    const uint32_t target = to + swizzled(row, place * kChunkBytes);
    if (rows.aligned) {
      machine.copy_async(target, from, bytes[i]);
    } else {
      auto* elements = reinterpret_cast<uint16_t*>(machine.shared() + target);
      LK_UNROLL
      for (int e = 0; e < kChunkElements; ++e) elements[e] = 2 * e < bytes[i] ? from[e] : uint16_t{0};
    }
  }
}

// Left operand [16, 16] at (row, k) of the product: X itself, or its transpose.
template <bool transposed, class Machine>
LK_FN void load_left(Machine& machine, uint32_t (&words)[4], uint32_t tile, int row, int k) {
  const int lane = machine.thread() % 32;
  const Position p = transposed ? left_transposed_position(lane) : left_position(lane);
  const int tile_row = transposed ? k : row, tile_column = transposed ? row : k;
  machine.template load_matrices<transposed>(words, tile + swizzled(tile_row + p.row, (tile_column + p.column) * 2));
}

// The 64 x 64 result of a thread block: each warp has 32 x 32 of it, in fragments of 16 x 8.
struct Accumulator {
  float value[2][4][4];

  LK_FN static int warp_row(int thread) { return thread / 64 * 32; }
  LK_FN static int warp_column(int thread) { return thread / 32 % 2 * 32; }

  LK_FN void clear() {
    LK_UNROLL
    for (int i = 0; i < 32; ++i) value[i / 16][i / 4 % 4][i % 4] = 0.0f;
  }

  // Calls visit(row, column, value) for each element this thread has.
  template <class Visit>
  LK_FN void for_each(int thread, Visit visit) const {
    LK_UNROLL
    for (int i = 0; i < 2; ++i) {
      LK_UNROLL
      for (int j = 0; j < 4; ++j) {
        LK_UNROLL
        for (int index = 0; index < 4; ++index) {
          visit(warp_row(thread) + i * 16 + fragment_row(thread % 32, index),
                warp_column(thread) + j * 8 + fragment_column(thread, index), value[i][j][index]);
        }
      }
    }
  }
};

// Runs `load(step)` ahead of `compute(step)` for steps 0 .. steps - 1, kTileStages in flight.
template <class Machine, class Load, class Compute>
LK_FN void pipeline(Machine& machine, int64_t steps, Load load, Compute compute) {
  for (int64_t step = 0; step < kTileStages - 1; ++step) {
    if (step < steps) load(step);
    machine.commit_copies();
  }
  for (int64_t step = 0; step < steps; ++step) {
    machine.template wait_copies<kTileStages - 2>();
    machine.sync();  // this step is there, and all are done with the one before, whose stage is refilled now
    if (step + kTileStages - 1 < steps) load(step + kTileStages - 1);
    machine.commit_copies();
    compute(step);
  }
}

}  // namespace lk
