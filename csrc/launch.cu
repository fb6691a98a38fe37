// The kernels as CUDA sees them, and their launches.
#include "launch.h"

#include <array>
#include <map>
#include <memory>
#include <mutex>

#include "gram_group.h"
#include "machine.cuh"
#include "plan.h"

namespace lk {
namespace {

template <class Element>
__global__ void __launch_bounds__(kTileThreads) gram_group_kernel(const __grid_constant__ GramTable table) {
  Block block;
  gram_group<Element>(block, table);
}

template <class Element, bool project>
__global__ void __launch_bounds__(kTileThreads) gram_sketch_tiles_kernel(const __grid_constant__ SketchTiles sketch) {
  Block block;
  gram_sketch_tiles<Element, project>(block, sketch);
}

template <class Element, class Tiling>
__global__ void __launch_bounds__(Tiling::kThreads, 1)
    gram_sketch_cluster_kernel(const __grid_constant__ Sketch sketch) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if (__cvta_generic_to_shared(shared_memory) % 1024 != 0) __trap();  // the swizzle counts rows by address
  Cluster cluster;
  SketchCluster<Element, Tiling, Cluster>(cluster, sketch).run();
#endif
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw CudaError(std::string(what) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
  }
}

cudaLaunchConfig_t configuration(int64_t blocks, int threads, uint32_t shared_bytes, uint64_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  return config;
}

template <class Kernel, class Argument>
void launch(const char* name, Kernel kernel, const Argument& argument, int64_t blocks, int threads,
            uint32_t shared_bytes, uint64_t stream) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw CudaError(std::string(name) + ": the update needs more thread blocks than a grid has");
  const auto config = configuration(blocks, threads, shared_bytes, stream);
  check(cudaLaunchKernelEx(&config, kernel, argument), name);
}

cudaLaunchAttribute cluster_of(int ranks) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
  return attribute;
}

// What is asked of a device once.
struct Device {
  std::string refusal;
  int processors = 0;
  bool hopper = false;
  std::array<std::array<std::map<int, int>, kTilings>, 2> clusters;  // [fp16][tiling][ranks] -> clusters at once

  explicit Device(int ordinal) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, ordinal), "cudaGetDeviceProperties");
    processors = properties.multiProcessorCount;
    hopper = properties.major == 9 && properties.minor == 0;
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, gram_group_kernel<Bf16>) != cudaSuccess) {
      refusal = std::string(properties.name) + " is sm_" + std::to_string(properties.major * 10 + properties.minor) +
                ", and the library has code for " LK_ARCHITECTURES " only";
      return;
    }
    grow(gram_sketch_tiles_kernel<Bf16, true>);
    grow(gram_sketch_tiles_kernel<Bf16, false>);
    grow(gram_sketch_tiles_kernel<Fp16, true>);
    grow(gram_sketch_tiles_kernel<Fp16, false>);
  }

  static Device& current() {
    static std::mutex mutex;
    static std::map<int, std::unique_ptr<Device>> devices;
    int ordinal = 0;
    check(cudaGetDevice(&ordinal), "cudaGetDevice");
    const std::lock_guard<std::mutex> lock(mutex);
    auto& device = devices[ordinal];
    if (!device) device = std::make_unique<Device>(ordinal);
    return *device;
  }

 private:
  template <class Kernel>
  static void grow(Kernel kernel) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSketchSharedBytes),
          "gram_sketch_tiles");
  }
};

// Clusters of a size that the device runs at the same time, 0 if it cannot form one.
template <class Kernel>
int clusters_at_once(Kernel kernel, int threads, uint32_t shared_bytes, int ranks) {
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes) != cudaSuccess ||
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) {
    return 0;
  }
  auto config = configuration(ranks, threads, shared_bytes, 0);
  auto attribute = cluster_of(ranks);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  return cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess ? count : 0;
}

struct ClusterPlan {
  int tiling, ranks, clusters;  // no cluster: the portable kernels serve
};

template <class Element>
ClusterPlan plan_cluster(Device& device, const Sketch& sketch) {
  if (!device.hopper || !rows_aligned(sketch.x, sketch.x_stride)) return {0, 0, 0};
  static std::mutex mutex;
  for (int tiling = 0; tiling < kTilings; ++tiling) {
    const int ranks = cluster_ranks(tiling, sketch.d, sketch.m);
    if (ranks == 0) continue;
    const std::lock_guard<std::mutex> lock(mutex);
    auto& known = device.clusters[Element::kNarrowRange][tiling];
    if (known.count(ranks) == 0) {
      known[ranks] = with_tiling(tiling, [&](auto shape) {
        using Shape = decltype(shape);
        return clusters_at_once(gram_sketch_cluster_kernel<Element, Shape>, Shape::kThreads, Shape::kSharedBytes,
                                ranks);
      });
    }
    if (known[ranks] > 0) return {tiling, ranks, known[ranks]};
  }
  return {0, 0, 0};
}

template <class Element>
void launch_cluster(const ClusterPlan& plan, const Sketch& sketch, bool deterministic, uint64_t stream) {
  with_tiling(plan.tiling, [&](auto shape) {
    using Shape = decltype(shape);
    const auto kernel = gram_sketch_cluster_kernel<Element, Shape>;
    const int64_t useful = smaller(plan.clusters, ceil_div(sketch.tokens, Shape::kTokens));
    const int64_t clusters = deterministic ? 1 : useful;  // one cluster adds to Y once; several do in any order
    auto config = configuration(clusters * plan.ranks, Shape::kThreads, Shape::kSharedBytes, stream);
    auto attribute = cluster_of(plan.ranks);
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, kernel, sketch), "gram_sketch_cluster");
  });
}

template <class Element>
void launch_tiles(const Device& device, const Sketch& sketch, float* workspace, bool deterministic, uint64_t stream) {
  constexpr int64_t kTokensPerPart = 512;
  const int64_t block_tokens = cached_tokens(sketch.tokens, sketch.d);
  const int64_t wanted = ceil_div(device.processors, sketch_blocks(sketch.d, sketch.m, 1));
  const int64_t parts = deterministic ? 1 : smaller(wanted, ceil_div(block_tokens, kTokensPerPart));
  for (int64_t first = 0; first < sketch.tokens; first += block_tokens) {
    const auto pair = sketch_launches(sketch, workspace, first, block_tokens, static_cast<int>(parts));
    launch("gram_sketch_tiles", gram_sketch_tiles_kernel<Element, true>, pair.project, pair.project_blocks,
           kTileThreads, kSketchSharedBytes, stream);
    launch("gram_sketch_tiles", gram_sketch_tiles_kernel<Element, false>, pair.accumulate, pair.accumulate_blocks,
           kTileThreads, kSketchSharedBytes, stream);
  }
}

bool empty(const Sketch& sketch) { return sketch.tokens == 0 || sketch.d == 0 || sketch.m == 0; }

template <class Element>
void flush_as(const std::vector<Gram>& grams, const std::vector<Sketch>& sketches, uint64_t workspace,
              bool deterministic, uint64_t stream) {
  Device& device = Device::current();
  if (!device.refusal.empty()) throw CudaError(device.refusal);
  const auto table = std::make_unique<GramTable>();
  const auto count = static_cast<int64_t>(grams.size());
  for (int64_t first = 0; first < count;) {
    first = fill_table(*table, grams.data(), first, count, device.processors, !deterministic);
    launch("gram_group", gram_group_kernel<Element>, *table, table->tiles, kTileThreads, kGramSharedBytes, stream);
  }
  for (const Sketch& sketch : sketches) {
    if (empty(sketch)) continue;
    const ClusterPlan plan = plan_cluster<Element>(device, sketch);
    if (plan.clusters > 0) {
      launch_cluster<Element>(plan, sketch, deterministic, stream);
    } else {
      launch_tiles<Element>(device, sketch, reinterpret_cast<float*>(workspace), deterministic, stream);
    }
  }
}

}  // namespace

std::string refusal() { return Device::current().refusal; }

int64_t workspace_floats(const std::vector<Sketch>& sketches, bool fp16) {
  Device& device = Device::current();
  int64_t floats = 0;  // launches on a stream follow one another and share it
  for (const Sketch& sketch : sketches) {
    const auto plan = fp16 ? plan_cluster<Fp16>(device, sketch) : plan_cluster<Bf16>(device, sketch);
    if (plan.clusters == 0 && !empty(sketch)) {
      const int64_t needed = cached_tokens(sketch.tokens, sketch.d) * z_stride(sketch.m);
      floats = needed > floats ? needed : floats;
    }
  }
  return floats;
}

void flush(const std::vector<Gram>& grams, const std::vector<Sketch>& sketches, bool fp16, uint64_t workspace,
           bool deterministic, uint64_t stream) {
  (fp16 ? flush_as<Fp16> : flush_as<Bf16>)(grams, sketches, workspace, deterministic, stream);
}

}  // namespace lk
