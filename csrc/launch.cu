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

__global__ void __launch_bounds__(kTileThreads) add_planes_kernel(const __grid_constant__ Planes planes) {
  Block block;
  add_planes(block, planes);
}

template <class Element, class Tiling>
__global__ void __launch_bounds__(Tiling::kThreads, 1)
    gram_sketch_cluster_kernel(const __grid_constant__ Sketch sketch, const int64_t plane) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if (__cvta_generic_to_shared(shared_memory) % 1024 != 0) __trap();  // the swizzle counts rows by address
  Cluster cluster;
  SketchCluster<Element, Tiling, Cluster>(cluster, sketch, plane).run();
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
    const cudaError_t found = cudaFuncGetAttributes(&attributes, gram_group_kernel<Bf16>);
    if (found == cudaErrorNoKernelImageForDevice || found == cudaErrorInvalidDeviceFunction) {
      refusal = std::string(properties.name) + " is sm_" + std::to_string(properties.major * 10 + properties.minor) +
                ", and the library has code for " LK_ARCHITECTURES " only";
      return;
    }
    check(found, "cudaFuncGetAttributes");  // anything else may pass, and is not remembered
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

template <class Element>
ClusterShape cluster_shape(Device& device, int64_t d, int64_t m) {
  if (!device.hopper) return {0, 0, 0};
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  return choose_cluster(d, m, [&](int tiling, int ranks) {
    auto& known = device.clusters[Element::kNarrowRange][tiling];
    if (known.count(ranks) == 0) {
      known[ranks] = with_tiling(tiling, [&](auto shape) {
        using Shape = decltype(shape);
        return clusters_at_once(gram_sketch_cluster_kernel<Element, Shape>, Shape::kThreads, Shape::kSharedBytes,
                                ranks);
      });
    }
    return known[ranks];
  });
}

// How the cluster kernel serves an update; without a cluster it does not, and the portable kernels do.
struct ClusterPlan {
  ClusterShape shape;
  int64_t clusters;
  int64_t y_plane;  // floats of a plane; 0: clusters add to Y

  int64_t workspace_floats() const { return clusters * y_plane; }
};

template <class Element>
ClusterPlan plan_cluster(Device& device, const Sketch& sketch, bool deterministic) {
  if (!rows_aligned(sketch.x, sketch.x_stride)) return {};
  const ClusterShape shape = cluster_shape<Element>(device, sketch.d, sketch.m);
  const int64_t steps = with_tiling(shape.tiling, [&](auto t) { return ceil_div(sketch.tokens, t.kTokens); });
  const int64_t clusters = smaller(shape.clusters, steps);
  return {shape, clusters, y_plane(sketch, clusters, deterministic)};
}

void launch_add_planes(const Planes& planes, uint64_t stream) {
  launch("add_planes", add_planes_kernel, planes, plane_blocks(planes), kTileThreads, 0, stream);
}

template <class Element>
void launch_cluster(const ClusterPlan& plan, const Sketch& sketch, float* workspace, uint64_t stream) {
  const Planes planes = y_planes(sketch, workspace, plan.clusters, plan.y_plane);
  with_tiling(plan.shape.tiling, [&](auto shape) {
    using Shape = decltype(shape);
    auto config = configuration(plan.clusters * plan.shape.ranks, Shape::kThreads, Shape::kSharedBytes, stream);
    auto attribute = cluster_of(plan.shape.ranks);
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, gram_sketch_cluster_kernel<Element, Shape>, redirected(sketch, planes),
                             plan.y_plane),
          "gram_sketch_cluster");
  });
  launch_add_planes(planes, stream);
}

template <class Element>
void launch_tiles(const TilesPlan& plan, const Sketch& sketch, float* workspace, uint64_t stream) {
  auto product = [&](auto kernel, const SketchTiles& tiles, int64_t rows) {
    launch("gram_sketch_tiles", kernel, tiles, sketch_blocks(rows, tiles.m, tiles.parts), kTileThreads,
           kSketchSharedBytes, stream);
  };
  for (int64_t first = 0; first < sketch.tokens; first += plan.block_tokens) {
    const SketchLaunches launches = sketch_launches(sketch, plan, workspace, first);
    product(gram_sketch_tiles_kernel<Element, true>, launches.project, launches.project.tokens);
    launch_add_planes(launches.z, stream);
    product(gram_sketch_tiles_kernel<Element, false>, launches.accumulate, sketch.d);
    launch_add_planes(launches.y, stream);
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
    const auto plan = plan_cluster<Element>(device, sketch, deterministic);
    auto* floats = reinterpret_cast<float*>(workspace);
    if (plan.clusters > 0) {
      launch_cluster<Element>(plan, sketch, floats, stream);
    } else {
      launch_tiles<Element>(plan_tiles(sketch, device.processors, deterministic), sketch, floats, stream);
    }
  }
}

}  // namespace

std::string refusal() { return Device::current().refusal; }

std::pair<int, int> cluster(int64_t d, int64_t m, bool fp16) {
  const auto shape = (fp16 ? cluster_shape<Fp16> : cluster_shape<Bf16>)(Device::current(), d, m);
  return {shape.ranks, shape.clusters};
}

int64_t workspace_floats(const std::vector<Sketch>& sketches, bool fp16, bool deterministic) {
  Device& device = Device::current();
  const auto plan_cluster_as = fp16 ? plan_cluster<Fp16> : plan_cluster<Bf16>;
  int64_t floats = 0;  // launches on a stream follow one another and share it
  for (const Sketch& sketch : sketches) {
    if (empty(sketch)) continue;
    const auto plan = plan_cluster_as(device, sketch, deterministic);
    const int64_t needed = plan.clusters > 0 ? plan.workspace_floats()
                                             : plan_tiles(sketch, device.processors, deterministic).workspace_floats();
    floats = needed > floats ? needed : floats;
  }
  return floats;
}

void flush(const std::vector<Gram>& grams, const std::vector<Sketch>& sketches, bool fp16, uint64_t workspace,
           bool deterministic, uint64_t stream) {
  (fp16 ? flush_as<Fp16> : flush_as<Bf16>)(grams, sketches, workspace, deterministic, stream);
}

}  // namespace lk
