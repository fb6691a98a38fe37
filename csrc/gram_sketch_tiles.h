// gram_sketch_ anywhere: two products per block of tokens, Z = X Omega and Y += alpha * X^T Z, the block small enough
// to stay in the L2 cache between them. It serves what the cluster kernel (gram_sketch_cluster.h) cannot: GPUs other
// than Hopper, rows that are not aligned, d or m beyond a cluster's memory.
//
// A block of tokens has too few tiles of Z for a large GPU when d is large, so the sums over d are split into parts.
// Each writes a plane of its own; `add_planes` adds them up in order.
//
// Omega and Z are fp32 and enter the products in two bf16 parts. fp16 rows do too, which is exact.
//
// It has run on the host emulation (tests/cuda/emulator) only, never yet on a GPU.
#pragma once

#include "tile.h"

namespace lk {

struct SketchTiles {
  uint64_t x, mask, right, out;  // right and out: Omega and Z to project, Z and Y to accumulate
  int64_t tokens, x_stride, right_stride, out_stride;
  int64_t plane;  // floats of a plane, of which each part has one; 0: the parts add to `out`, in any order
  int32_t d, m;
  float alpha;
  int32_t parts;  // of d to project, of the tokens to accumulate
};

// Planes [rows, m], the rows `pitch(m)` floats apart, and the matrix they are added to.
struct Planes {
  uint64_t out, planes;
  int64_t out_stride, rows;
  int32_t m, count;
};

constexpr int kRightPitch = kTile + 4;  // floats from row to row: a fragment is read without bank conflicts
constexpr uint32_t kRightBytes = kTile * kRightPitch * sizeof(float);
constexpr uint32_t kSketchStageBytes = kTileBytes + kRightBytes;
constexpr uint32_t kSketchSharedBytes = kTileStages * kSketchStageBytes;
static_assert(kSketchStageBytes % 1024 == 0 && kSketchSharedBytes <= 101376, "shared memory of sm_86 and sm_89");

// Thread blocks of a product: 64 rows of the result by 64 columns of Omega, by part.
LK_FN constexpr int64_t sketch_blocks(int64_t rows, int64_t m, int64_t parts) {
  return ceil_div(rows, kTile) * ceil_div(m, kTile) * parts;
}
LK_FN constexpr int64_t plane_blocks(const Planes& p) {
  return p.count == 0 ? 0 : ceil_div(p.rows * p.m, kTileThreads);
}
// Floats from row to row of Z and of planes: rows start at multiples of 16 bytes.
LK_FN constexpr int64_t pitch(int64_t m) { return ceil_div(m, 4) * 4; }

// Rows k0 .. of a fp32 matrix [last_row, m], columns n0 .., to shared memory. Rows start at multiples of 16 bytes.
template <class Machine>
LK_FN void load_right(Machine& machine, uint32_t to, const SketchTiles& s, int64_t k0, int64_t last_row, int64_t n0) {
  const auto* right = reinterpret_cast<const float*>(s.right);
  LK_UNROLL
  for (int i = 0; i < kTile * kTile / 4 / kTileThreads; ++i) {
    const int chunk = machine.thread() + i * kTileThreads;
    const int row = chunk / (kTile / 4), column = chunk % (kTile / 4) * 4;
    const int bytes = k0 + row < last_row ? chunk_bytes(n0 + column, s.m, sizeof(float)) : 0;
    machine.copy_async(to + static_cast<uint32_t>((row * kRightPitch + column) * sizeof(float)),
                       bytes > 0 ? right + (k0 + row) * s.right_stride + n0 + column : right, bytes);
  }
}

// Z = X Omega (project), or Y += alpha X^T Z, or a part of either.
template <class Element, bool project, class Machine>
LK_FN void gram_sketch_tiles(Machine& machine, const SketchTiles& s) {
  const int block = static_cast<int>(machine.block());  // a grid has no more: divide 32 bits, not 64
  const int column_tiles = static_cast<int>(ceil_div(s.m, kTile)), index = block / s.parts, part = block % s.parts;
  const int64_t row0 = int64_t{index / column_tiles} * kTile, n0 = int64_t{index % column_tiles} * kTile;
  const Range inner = part_of(project ? s.d : s.tokens, part, s.parts, kTile);
  const Rows rows(s.x, s.mask, s.x_stride, project ? s.tokens : inner.last, project ? inner.last : s.d);
  const int thread = machine.thread(), lane = thread % 32;
  auto x_tile = [](int64_t step) { return static_cast<uint32_t>(step % kTileStages) * kSketchStageBytes; };

  Accumulator sum;
  sum.clear();
  auto load = [&](int64_t step) {
    const int64_t k = inner.first + step * kTile;
    load_tile(machine, x_tile(step), rows, project ? row0 : k, project ? k : row0);
    load_right(machine, x_tile(step) + kTileBytes, s, k, inner.last, n0);
  };
  auto compute = [&](int64_t step) {
    const auto* right = reinterpret_cast<const float*>(machine.shared() + x_tile(step) + kTileBytes);
    for (int k = 0; k < kTile; k += 16) {
      uint32_t high[2][4], low[2][4];
      LK_UNROLL
      for (int i = 0; i < 2; ++i) {
        load_left<!project>(machine, high[i], x_tile(step), Accumulator::warp_row(thread) + i * 16, k);
        if constexpr (Element::kNarrowRange) {
          LK_UNROLL
          for (int w = 0; w < 4; ++w) {
            split<Bf16>(Element::first(high[i][w]), Element::second(high[i][w]), high[i][w], low[i][w]);
          }
        }
      }
      LK_UNROLL
      for (int j = 0; j < 4; ++j) {
        uint32_t part[2][2];  // [high, low][word]
        LK_UNROLL
        for (int w = 0; w < 2; ++w) {
          const float* pair = right + (k + w * 8 + lane % 4 * 2) * kRightPitch + Accumulator::warp_column(thread) +
                              j * 8 + lane / 4;
          split<Bf16>(pair[0], pair[kRightPitch], part[0][w], part[1][w]);
        }
        LK_UNROLL
        for (int i = 0; i < 2; ++i) {
          machine.template multiply<Bf16>(sum.value[i][j], high[i], part[0][0], part[0][1]);
          machine.template multiply<Bf16>(sum.value[i][j], high[i], part[1][0], part[1][1]);
          if constexpr (Element::kNarrowRange) {
            machine.template multiply<Bf16>(sum.value[i][j], low[i], part[0][0], part[0][1]);
          }
        }
      }
    }
  };
  pipeline(machine, inner.last <= inner.first ? 0 : ceil_div(inner.last - inner.first, kTile), load, compute);

  auto* out = reinterpret_cast<float*>(s.out) + part * s.plane;
  const int64_t last_row = project ? s.tokens : s.d;
  sum.for_each(thread, [&](int i, int j, float value) {
    const int64_t row = row0 + i, column = n0 + j;
    if (row < last_row && column < s.m) put_sum(machine, out + row * s.out_stride + column, s.alpha * value, s.plane);
  });
}

// out += the planes, one after the other. A thread has one element.
template <class Machine>
LK_FN void add_planes(Machine& machine, const Planes& p) {
  const int64_t index = machine.block() * kTileThreads + machine.thread();
  const int64_t row = index / p.m, column = index % p.m;
  if (row >= p.rows) return;
  const auto* from = reinterpret_cast<const float*>(p.planes) + row * pitch(p.m) + column;
  float sum = 0.0f;
  for (int plane = 0; plane < p.count; ++plane) sum += from[plane * p.rows * pitch(p.m)];
  reinterpret_cast<float*>(p.out)[row * p.out_stride + column] += sum;
}

}  // namespace lk
