// The kernels of csrc on the emulated machine, and their index maps, for ctypes.
#include <cstdio>
#include <memory>

#include "gram_group.h"
#include "gram_sketch_tiles.h"
#include "machine.h"
#include "plan.h"

namespace {

thread_local char message[256];

template <class Function>
const char* guarded(Function function) {
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof message, "%s", error.what());
    return message;
  }
}

void add_planes(const lk::Planes& planes, uint64_t seed) {
  emulator::launch(lk::kTileThreads, 1, lk::plane_blocks(planes), 0, seed,
                   [&](emulator::Machine& machine) { lk::add_planes(machine, planes); });
}

template <class Element, class Tiling>
void sketch_cluster(const lk::Sketch& sketch, int ranks, int clusters, float* workspace, uint64_t seed) {
  const int64_t plane = lk::y_plane(sketch, clusters, workspace != nullptr);
  const auto planes = lk::y_planes(sketch, workspace, clusters, plane);
  const auto redirected = lk::redirected(sketch, planes);
  emulator::launch(Tiling::kThreads, ranks, clusters, Tiling::kSharedBytes, seed, [&](emulator::Machine& machine) {
    lk::SketchCluster<Element, Tiling, emulator::Machine>(machine, redirected, plane).run();
  });
  add_planes(planes, seed);
}

template <class Element, bool project>
void product(const lk::SketchTiles& s, int64_t rows, uint64_t seed) {
  const int64_t blocks = lk::sketch_blocks(rows, s.m, s.parts);
  emulator::launch(lk::kTileThreads, 1, blocks, lk::kSketchSharedBytes, seed, [&](emulator::Machine& machine) {
    lk::gram_sketch_tiles<Element, project>(machine, s);
  });
}

template <class Element>
void sketch_tiles(const lk::Sketch& sketch, const lk::TilesPlan& plan, float* workspace, uint64_t seed) {
  for (int64_t first = 0; first < sketch.tokens; first += plan.block_tokens) {
    const auto launches = lk::sketch_launches(sketch, plan, workspace, first);
    product<Element, true>(launches.project, launches.project.tokens, seed);
    add_planes(launches.z, seed);
    product<Element, false>(launches.accumulate, sketch.d, seed);
    add_planes(launches.y, seed);
  }
}

template <class Element>
void gram_group(const lk::GramTable& table, uint64_t seed) {
  emulator::launch(lk::kTileThreads, 1, table.tiles, lk::kGramSharedBytes, seed,
                   [&](emulator::Machine& machine) { lk::gram_group<Element>(machine, table); });
}

}  // namespace

extern "C" {

// With a workspace, of clusters * d * pitch(m) floats, every cluster has a plane of its own: deterministic.
const char* emulate_sketch_cluster(const lk::Sketch* sketch, int fp16, int tiling, int ranks, int clusters,
                                   float* workspace, uint64_t seed) {
  return guarded([&] {
    lk::with_tiling(tiling, [&](auto shape) {
      using Shape = decltype(shape);
      const auto run = fp16 ? sketch_cluster<lk::Fp16, Shape> : sketch_cluster<lk::Bf16, Shape>;
      run(*sketch, ranks, clusters, workspace, seed);
    });
  });
}

const char* emulate_sketch_tiles(const lk::Sketch* sketch, const lk::TilesPlan* plan, int fp16, float* workspace,
                                 uint64_t seed) {
  const auto run = fp16 ? sketch_tiles<lk::Fp16> : sketch_tiles<lk::Bf16>;
  return guarded([&] { run(*sketch, *plan, workspace, seed); });
}

// Returns an error or nullptr; `launches` counts the tables.
const char* emulate_gram_group(const lk::Gram* grams, int64_t count, int fp16, int processors, int split, uint64_t seed,
                               int* launches) {
  return guarded([&] {
    auto table = std::make_unique<lk::GramTable>();
    *launches = 0;
    for (int64_t first = 0; first < count;) {
      first = lk::fill_table(*table, grams, first, count, processors, split);
      if (table->tiles == 0) continue;
      ++*launches;
      (fp16 ? gram_group<lk::Fp16> : gram_group<lk::Bf16>)(*table, seed);
    }
  });
}

// ---- Index maps ----

uint32_t swizzled(uint32_t row, uint32_t byte) { return lk::swizzled(row, byte); }
int chunk_bytes(int64_t column, int64_t last, int size) { return lk::chunk_bytes(column, last, size); }
int64_t columns_per_rank(int64_t d, int ranks) { return lk::columns_per_rank(d, ranks); }
int fragment_row(int thread, int index) { return lk::fragment_row(thread, index); }
int fragment_column(int thread, int index) { return lk::fragment_column(thread, index); }
int unit_of(int quad, int thread, int threads) { return lk::unit_of(quad, thread, threads); }
int unit_owner(int unit, int units, int ranks) { return lk::unit_owner(unit, units, ranks); }
int unit_slot(int unit, int units, int ranks) { return lk::unit_slot(unit, units, ranks); }
void lower_tile(int64_t index, int* row, int* column) {
  const auto p = lk::lower_tile(index);
  *row = p.row, *column = p.column;
}
void part_of(int64_t tokens, int part, int parts, int step, int64_t* first, int64_t* last) {
  const auto range = lk::part_of(tokens, part, parts, step);
  *first = range.first, *last = range.last;
}
int cluster_tilings() { return lk::kTilings; }
void tiling_shape(int tiling, int64_t* m, int64_t* columns, int64_t* shared_bytes) {
  lk::with_tiling(tiling, [&](auto shape) {
    using Shape = decltype(shape);
    *m = Shape::kBlocks * 64, *columns = Shape::kPanels * 64, *shared_bytes = Shape::kSharedBytes;
  });
}
int tiling_ranks(int tiling, int64_t d, int64_t m) { return lk::cluster_ranks(tiling, d, m); }
int64_t fill_table(lk::GramTable* table, const lk::Gram* grams, int64_t first, int64_t count, int processors,
                   int split) {
  return lk::fill_table(*table, grams, first, count, processors, split);
}
int find_member(const lk::GramTable* table, int64_t index) { return lk::find_member(*table, index); }
void choose_cluster(int64_t d, int64_t m, int (*clusters_at_once)(int, int), int* tiling, int* ranks, int* clusters) {
  const auto shape = lk::choose_cluster(d, m, clusters_at_once);
  *tiling = shape.tiling, *ranks = shape.ranks, *clusters = shape.clusters;
}
void plan_tiles(const lk::Sketch* sketch, int processors, int deterministic, lk::TilesPlan* plan) {
  *plan = lk::plan_tiles(*sketch, processors, deterministic);
}
int64_t workspace_floats(const lk::TilesPlan* plan) { return plan->workspace_floats(); }
int64_t sketch_blocks(int64_t rows, int64_t m, int64_t parts) { return lk::sketch_blocks(rows, m, parts); }
int64_t table_bytes() { return sizeof(lk::GramTable); }

// Rounds pairs of floats, and splits them: for comparison with torch's conversions.
void round_floats(const float* values, int64_t count, int fp16, uint16_t* rounded, float* back, float* low) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t high, rest;
    if (fp16) {
      lk::split<lk::Fp16>(values[i], values[i], high, rest);
      back[i] = lk::Fp16::second(high), low[i] = lk::Fp16::first(rest);
    } else {
      lk::split<lk::Bf16>(values[i], values[i], high, rest);
      back[i] = lk::Bf16::second(high), low[i] = lk::Bf16::first(rest);
    }
    rounded[i] = static_cast<uint16_t>(high);
  }
}

}  // extern "C"
