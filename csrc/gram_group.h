// gram_group_: C += alpha * X^T X, lower triangle, for many X of any shapes in one launch (a grouped SYRK).
//
// The table of members is passed by value in the kernel's parameters: no copy to the device comes before the launch. A
// thread block takes one 64 x 64 tile of one C, over all tokens or a part of them. It adds to C in device memory
// once; with one part per tile the result is the same bit for bit in every run.
//
// It has run on the host emulation (tests/cuda/emulator) only, never yet on a GPU.
#pragma once

#include "tile.h"

namespace lk {

struct Member {
  Gram gram;
  int32_t parts;       // of the tokens, per tile
  int32_t first_tile;  // number of (tile, part) pairs of the members before
};

struct GramTable {
  static constexpr int kCapacity = 500;
  int32_t count, tiles;
  Member members[kCapacity];
};
static_assert(sizeof(GramTable) <= 32764, "kernel parameters, since CUDA 12.1");

LK_FN constexpr int64_t gram_tiles(int64_t d) { return triangle(ceil_div(d, kTile)); }

// The member that a (tile, part) pair belongs to: the last one that starts at or before it.
LK_FN int find_member(const GramTable& table, int64_t index) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.members[middle].first_tile <= index ? low : high) = middle;
  }
  return low;
}

// Fills the next launch's table from updates first .. count - 1; returns the first one that did not fit. A group
// with fewer tiles than `processors` has its tokens split until every processor has work, if `split` allows.
inline int64_t fill_table(GramTable& table, const Gram* grams, int64_t first, int64_t count, int processors,
                          bool split) {
  constexpr int64_t kMaxTiles = int64_t{1} << 30, kTokensPerPart = 512;
  int64_t tiles = 0, next = first, parts_wanted = 1;
  for (; next < count && next - first < GramTable::kCapacity; ++next) {
    const int64_t more = gram_tiles(grams[next].d);
    if (next > first && tiles + more > kMaxTiles) break;
    tiles += more;
  }
  if (split && tiles > 0) parts_wanted = ceil_div(processors, tiles);
  table.count = table.tiles = 0;
  for (int64_t i = first; i < next; ++i) {
    if (grams[i].d == 0 || grams[i].tokens == 0) continue;
    const int64_t parts = smaller(parts_wanted, ceil_div(grams[i].tokens, kTokensPerPart));
    table.members[table.count++] = {grams[i], static_cast<int32_t>(parts), table.tiles};
    table.tiles += static_cast<int32_t>(gram_tiles(grams[i].d) * parts);
  }
  return next;
}

constexpr uint32_t kGramSharedBytes = kTileStages * 2 * kTileBytes;

template <class Element, class Machine>
LK_FN void gram_group(Machine& machine, const GramTable& table) {
  const Member& member = table.members[find_member(table, machine.block())];
  const Gram& gram = member.gram;
  const int64_t index = machine.block() - member.first_tile;
  const Position tile = lower_tile(index / member.parts);
  const int64_t row0 = int64_t{tile.row} * kTile, column0 = int64_t{tile.column} * kTile;
  const Range tokens = part_of(gram.tokens, static_cast<int>(index % member.parts), member.parts, kTile);
  const Rows rows(gram.x, gram.mask, gram.x_stride, tokens.last, gram.d);
  const bool diagonal = row0 == column0;  // both operands are one tile
  const int thread = machine.thread(), lane = thread % 32;
  auto left_tile = [](int64_t step) { return static_cast<uint32_t>(step % kTileStages) * 2 * kTileBytes; };
  auto right_tile = [&](int64_t step) { return left_tile(step) + (diagonal ? 0 : kTileBytes); };

  Accumulator sum;
  sum.clear();
  auto load = [&](int64_t step) {
    load_tile(machine, left_tile(step), rows, tokens.first + step * kTile, row0);
    if (!diagonal) load_tile(machine, right_tile(step), rows, tokens.first + step * kTile, column0);
  };
  auto compute = [&](int64_t step) {
    LK_UNROLL
    for (int k = 0; k < kTile; k += 16) {
      uint32_t left[2][4], right[2][4];
      LK_UNROLL
      for (int i = 0; i < 2; ++i) {
        load_left<true>(machine, left[i], left_tile(step), Accumulator::warp_row(thread) + i * 16, k);
        const Position p = right_position(lane);
        const int column = Accumulator::warp_column(thread) + i * 16 + p.column;
        machine.template load_matrices<true>(right[i], right_tile(step) + swizzled(k + p.row, column * 2));
      }
      LK_UNROLL
      for (int i = 0; i < 2; ++i) {
        LK_UNROLL
        for (int j = 0; j < 4; ++j) {
          machine.template multiply<Element>(sum.value[i][j], left[i], right[j / 2][j % 2 * 2],
                                             right[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  };
  pipeline(machine, tokens.last <= tokens.first ? 0 : ceil_div(tokens.last - tokens.first, kTile), load, compute);

  auto* c = reinterpret_cast<float*>(gram.c);
  sum.for_each(thread, [&](int i, int j, float value) {
    const int64_t row = row0 + i, column = column0 + j;
    if (row < gram.d && column <= row) machine.add(c + row * gram.c_stride + column, gram.alpha * value);
  });
}

}  // namespace lk
