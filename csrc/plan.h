// How an update is cut into launches: tilings and cluster sizes, blocks of tokens. Host code, tested as such.
#pragma once

#include "gram_sketch_cluster.h"
#include "gram_sketch_tiles.h"

namespace lk {

// The tilings of the cluster kernel, the preferred first: up to 64 columns of Omega and 256 columns of X per block; the
// same with 512 columns of X, in smaller steps; up to 128 columns of Omega.
constexpr int kTilings = 3;

template <class Function>
auto with_tiling(int tiling, Function function) {
  return tiling == 0   ? function(Tiling<1, 4, 64, 3>{})
         : tiling == 1 ? function(Tiling<1, 8, 16, 4>{})
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

// Tokens whose rows stay in the L2 cache between the two launches of the portable sketch: 24 MiB of 16-bit X.
inline int64_t cached_tokens(int64_t tokens, int64_t d) {
  const int64_t cached = (int64_t{24} << 20) / (2 * (d > 0 ? d : 1));
  return smaller(tokens, cached < 256 ? 256 : cached);
}

struct SketchPair {
  SketchTiles project, accumulate;
  int64_t project_blocks, accumulate_blocks;
};

// The two launches for tokens first .. first + block_tokens - 1, with Z [block_tokens, z_stride(m)] in `workspace`.
inline SketchPair sketch_launches(const Sketch& s, float* workspace, int64_t first, int64_t block_tokens, int parts) {
  const int64_t tokens = smaller(block_tokens, s.tokens - first);
  const uint64_t x = s.x + static_cast<uint64_t>(first * s.x_stride * 2);
  const uint64_t mask = s.mask == 0 ? 0 : s.mask + static_cast<uint64_t>(first);
  const auto z = reinterpret_cast<uint64_t>(workspace);
  return {{x, mask, s.omega, z, tokens, s.x_stride, s.omega_stride, z_stride(s.m), s.d, s.m, 1.0f, 1},
          {x, mask, z, s.y, tokens, s.x_stride, z_stride(s.m), s.y_stride, s.d, s.m, s.alpha, parts},
          sketch_blocks(tokens, s.m, 1),
          sketch_blocks(s.d, s.m, parts)};
}

}  // namespace lk
