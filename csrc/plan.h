// How an update is cut into launches: tilings and cluster sizes, blocks of tokens. Host code, tested as such.
#pragma once

#include "gram_sketch_cluster.h"
#include "gram_sketch_tiles.h"

namespace lk {

// The tilings of the cluster kernel, the preferred first: up to 64 columns of Omega and 256 columns of X per block; the
// same with 512 columns of X, in steps of half as many tokens; up to 128 columns of Omega.
constexpr int kTilings = 3;

template <class Function>
auto with_tiling(int tiling, Function function) {
  return tiling == 0   ? function(Tiling<1, 4, 64, 3>{})
         : tiling == 1 ? function(Tiling<1, 8, 32, 2>{})
                       : function(Tiling<2, 4, 32, 3>{});
}

// Blocks in a cluster, a power of two, that hold d columns of X and m of Omega in a tiling; 0 if no cluster does.
inline int cluster_ranks(int tiling, int64_t d, int64_t m) {
  return with_tiling(tiling, [&](auto shape) {
    using Shape = decltype(shape);
    if (m > Shape::kBlocks * 64) return 0;
    for (int ranks = 1; ranks <= Shape::kMaxRanks; ranks *= 2) {
      if (columns_per_rank(d, ranks) <= Shape::kPanels * kPanelColumns) return ranks;
    }
    return 0;
  });
}

// A tiling, blocks in a cluster, and clusters on the device at once; no cluster if none serves.
struct ClusterShape {
  int tiling, ranks, clusters;

  int processors() const { return ranks * clusters; }
};

// The shape that keeps the most processors busy: a large cluster leaves those of a GPC idle that do not make up another
// one. A tiling has to gain an eighth over those before it: the first one has the longest steps, and meets least often.
template <class ClustersAtOnce>
ClusterShape choose_cluster(int64_t d, int64_t m, ClustersAtOnce clusters_at_once) {
  ClusterShape best = {0, 0, 0};
  for (int tiling = 0; tiling < kTilings; ++tiling) {
    const int ranks = cluster_ranks(tiling, d, m);
    if (ranks == 0) continue;
    const ClusterShape shape = {tiling, ranks, clusters_at_once(tiling, ranks)};
    if (shape.processors() * 8 > best.processors() * 9) best = shape;
  }
  return best;
}

// Tokens whose rows stay in the L2 cache between the two products of the portable sketch: 24 MiB of 16-bit X.
inline int64_t cached_tokens(int64_t tokens, int64_t d) {
  const int64_t cached = (int64_t{24} << 20) / (2 * d);
  return smaller(tokens, cached < 256 ? 256 : cached);
}

// Floats of a plane of Y for each of `parts` sums that end there. None where a single one does, or where they may be
// added to Y in any order.
inline int64_t y_plane(const Sketch& s, int64_t parts, bool deterministic) {
  return deterministic && parts > 1 ? s.d * pitch(s.m) : 0;
}
// Adds these planes, if there are any, to Y.
inline Planes y_planes(const Sketch& s, const float* planes, int64_t parts, int64_t plane) {
  return {s.y, reinterpret_cast<uint64_t>(planes), s.y_stride, s.d, s.m, plane > 0 ? static_cast<int32_t>(parts) : 0};
}

// The update with its sums sent to planes, if there are any.
inline Sketch redirected(Sketch s, const Planes& planes) {
  if (planes.count > 0) s.y = planes.planes, s.y_stride = pitch(s.m);
  return s;
}

// How the portable kernels cut an update. Everything a launch needs in device memory follows from it.
struct TilesPlan {
  int64_t block_tokens;
  int64_t z_plane, y_plane;  // floats of a plane; 0: parts of Y are added to Y
  int32_t project_parts;     // of d
  int32_t accumulate_parts;  // of the tokens of a block

  int64_t workspace_floats() const { return project_parts * z_plane + accumulate_parts * y_plane; }
};

// As many parts as keep every processor busy, but no more than one for every 512 columns or tokens.
inline TilesPlan plan_tiles(const Sketch& s, int processors, bool deterministic) {
  const int64_t tokens = cached_tokens(s.tokens, s.d);
  auto parts = [&](int64_t rows, int64_t inner) {
    const int64_t wanted = ceil_div(processors, sketch_blocks(rows, s.m, 1));
    return static_cast<int32_t>(smaller(wanted, ceil_div(inner, 512)));
  };
  const int32_t project = parts(tokens, s.d), accumulate = parts(s.d, tokens);
  return {tokens, tokens * pitch(s.m), y_plane(s, accumulate, deterministic), project, accumulate};
}

// The launches for a block of tokens, in order. The planes of Z are added to the first of them.
struct SketchLaunches {
  SketchTiles project;
  Planes z;
  SketchTiles accumulate;
  Planes y;
};

inline SketchLaunches sketch_launches(const Sketch& s, const TilesPlan& plan, float* workspace, int64_t first) {
  const int64_t tokens = smaller(plan.block_tokens, s.tokens - first), z_stride = pitch(s.m);
  const int64_t z_plane = tokens * z_stride;  // the last block is smaller
  const uint64_t x = s.x + static_cast<uint64_t>(first * s.x_stride * 2);
  const uint64_t mask = s.mask == 0 ? 0 : s.mask + static_cast<uint64_t>(first);
  const auto z = reinterpret_cast<uint64_t>(workspace);
  const auto more_z = reinterpret_cast<uint64_t>(workspace + z_plane);
  const Planes y = y_planes(s, workspace + plan.project_parts * plan.z_plane, plan.accumulate_parts, plan.y_plane);
  const Sketch target = redirected(s, y);
  return {
      {x, mask, s.omega, z, tokens, s.x_stride, s.omega_stride, z_stride, z_plane, s.d, s.m, 1.0f, plan.project_parts},
      {z, more_z, z_stride, tokens, s.m, plan.project_parts - 1},
      {x, mask, z, target.y, tokens, s.x_stride, z_stride, target.y_stride, plan.y_plane, s.d, s.m, s.alpha,
       plan.accumulate_parts},
      y};
}

}  // namespace lk
