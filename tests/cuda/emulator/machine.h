// The host's version of csrc/machine.cuh: a GPU on which the kernel bodies of csrc run unchanged, to be tested.
//
// Every thread is a fiber; a seed decides who runs next. What the hardware does asynchronously (copies to shared
// memory, matrix products, stores to another block) happens at once or at the last moment the kernel waits for, again
// as the seed decides; a copy or a store that is late leaves NaN in its place until then. A missing wait, a missing
// barrier or a buffer reused too early thus gives wrong numbers for some seed. An asynchronous product that reads what
// its writer has not fenced, or a store to a block that does not run yet or any more, is an error. Layouts of
// fragments, ldmatrix and descriptors follow the PTX manual, not csrc/layout.h.
//
// Not modelled: the rest of the memory model (all else is sequentially consistent), bank conflicts, time.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "fibers.h"
#include "layout.h"
#include "updates.h"

namespace emulator {

using lk::Quad;

inline float element(uint16_t bits, bool narrow) {
  return narrow ? lk::Fp16::first(bits) : lk::Bf16::first(bits);
}

struct Product {  // of a warpgroup, issued and not yet executed: c [64, n] += a b
  float* c;
  const uint32_t* a;  // left operand in registers, or nullptr
  uint64_t a_descriptor, b_descriptor;
  int n;
  bool narrow;
};
struct Thread;

// Shared memory of a thread block and its meeting points.
struct BlockState {
  static constexpr uint32_t kBase = 2048;  // where the block's dynamic shared memory starts
  std::vector<uint8_t> storage;
  uint8_t* shared = nullptr;
  uint32_t bytes = 0;
  Barrier all, warps[32], groups[8];
  Thread* threads = nullptr;
  int started = 0, exited = 0;  // threads
  std::vector<int> unfenced;  // per 16 bytes: writes that asynchronous products do not see yet

  void init(Scheduler* scheduler, int threads_per_block, uint32_t shared_bytes) {
    bytes = shared_bytes;
    storage.assign(shared_bytes + 1024, 0xFF);  // NaN
    unfenced.assign(shared_bytes / 16, 0);
    shared = storage.data() + (1024 - reinterpret_cast<uintptr_t>(storage.data()) % 1024) % 1024;
    all.init(scheduler, threads_per_block);
    for (auto& warp : warps) warp.init(scheduler, 32);
    for (auto& group : groups) group.init(scheduler, 128);
  }
  void check(uint32_t offset, uint32_t size) const {
    if (offset % size != 0 || offset + size > bytes) throw std::runtime_error("shared memory address is wrong");
  }
  // Element `inner` of row `outer` of an operand with a 128-byte swizzle; the row is what 128 bytes hold.
  float operand(uint64_t descriptor, int outer, int inner, bool narrow) const {
    if (descriptor >> 62 != 1) throw std::runtime_error("descriptor is not of a 128-byte swizzle");
    const uint32_t start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    uint32_t address = start + outer / 8 * stride + outer % 8 * 128 + inner * 2;
    address ^= (address >> 7 & 7) << 4;
    if (address < kBase || address - kBase + 2 > bytes) throw std::runtime_error("operand outside shared memory");
    if (unfenced[(address - kBase) / 16] != 0) throw std::runtime_error("a product reads what is not fenced");
    uint16_t bits;
    std::memcpy(&bits, shared + address - kBase, 2);
    return element(bits, narrow);
  }
};

struct Thread {
  struct Copy {
    uint32_t to;
    const void* from;
    int bytes;
    bool done;
  };
  std::vector<std::vector<Copy>> groups{1};  // of copies; the last one is open
  std::vector<uint32_t> written;             // stores and finished copies since the last fence
  std::vector<Product> products;
  struct RemoteStore {
    uint8_t* to;
    Quad quad;
  };
  std::vector<RemoteStore> remote;  // stores that other blocks do not see yet
  void* slot = nullptr;  // what this thread brings to a meeting of its warp
  uint32_t address = 0;
};

// A grid or one cluster of it: all threads that run together.
struct Launch {
  Scheduler* scheduler;
  int threads_per_block, ranks;
  int64_t first_block, clusters;
  std::vector<BlockState> blocks;
  std::vector<Thread> threads;
  Barrier cluster;

  Launch(int threads, int cluster_blocks, int64_t block, int64_t cluster_count, uint32_t shared_bytes)
      : scheduler(nullptr), threads_per_block(threads), ranks(cluster_blocks), first_block(block),
        clusters(cluster_count), blocks(cluster_blocks), threads(threads * cluster_blocks),
        shared_bytes_(shared_bytes) {}

  void run(uint64_t seed, const std::function<void(int)>& body) {
    Scheduler fibers(threads_per_block * ranks, seed, body);
    scheduler = &fibers;
    cluster.init(scheduler, threads_per_block * ranks);
    for (int i = 0; i < ranks; ++i) {
      blocks[i].init(scheduler, threads_per_block, shared_bytes_);
      blocks[i].threads = &threads[i * threads_per_block];
    }
    fibers.run();
  }

 private:
  uint32_t shared_bytes_;
};

class Machine {
 public:
  Machine(Launch& launch, int index)
      : launch_(launch), thread_(index % launch.threads_per_block), rank_(index / launch.threads_per_block),
        block_(launch.blocks[rank_]), state_(launch.threads[index]) {
    ++block_.started;
  }
  ~Machine() { ++block_.exited; }

  int thread() const { return thread_; }
  int64_t block() const { return launch_.first_block + rank_; }
  int rank() const { return rank_; }
  int ranks() const { return launch_.ranks; }
  int64_t cluster() const { return launch_.first_block / launch_.ranks; }
  int64_t clusters() const { return launch_.clusters; }
  uint8_t* shared() const { return block_.shared; }
  void add(float* to, float value) const { *to += value; }

  void sync() { block_.all.meet(); }
  void cluster_arrive() {
    for (const auto& store : state_.remote) std::memcpy(store.to, &store.quad, sizeof store.quad);
    state_.remote.clear();
    ticket_ = launch_.cluster.arrive();
    launch_.scheduler->give_way();
  }
  void cluster_wait() { launch_.cluster.wait(ticket_); }
  void store(uint32_t to, uint32_t word) {
    block_.check(to, sizeof word);
    std::memcpy(block_.shared + to, &word, sizeof word);
    ++block_.unfenced[to / 16];
    state_.written.push_back(to / 16);
  }
  void fence_async() {
    for (uint32_t chunk : state_.written) --block_.unfenced[chunk];
    state_.written.clear();
  }
  void store_remote(int rank, uint32_t to, const Quad& quad) {
    block_.check(to, sizeof quad);
    const BlockState& target = launch_.blocks.at(rank);
    if (target.started == 0) throw std::runtime_error("a store to a block that has not started");
    if (target.exited == launch_.threads_per_block) throw std::runtime_error("a store to a block that has exited");
    if (launch_.scheduler->coin()) {
      std::memcpy(target.shared + to, &quad, sizeof quad);
    } else {
      std::memset(target.shared + to, 0xFF, sizeof quad);
      state_.remote.push_back({target.shared + to, quad});
    }
  }

  void copy_async(uint32_t to, const void* from, int bytes) {
    block_.check(to, 16);
    if (bytes < 0 || bytes > 16) throw std::runtime_error("a copy is of 0 to 16 bytes");
    if (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0) throw std::runtime_error("unaligned copy");
    const bool now = launch_.scheduler->coin();
    std::memset(block_.shared + to, now ? 0 : 0xFF, 16);
    if (now && bytes > 0) std::memcpy(block_.shared + to, from, bytes);
    ++block_.unfenced[to / 16];
    state_.groups.back().push_back({to, from, bytes, now});
  }
  void commit_copies() { state_.groups.emplace_back(); }
  template <int pending>
  void wait_copies() {
    for (size_t i = 0; i + pending + 1 < state_.groups.size(); ++i) {
      for (const auto& copy : state_.groups[i]) {
        if (!copy.done) {
          std::memset(block_.shared + copy.to, 0, 16);
          if (copy.bytes > 0) std::memcpy(block_.shared + copy.to, copy.from, copy.bytes);
        }
        state_.written.push_back(copy.to / 16);
      }
      state_.groups[i].clear();
    }
  }

  float shuffle_xor(float value, int lane) {
    state_.slot = &value;
    float result = 0.0f;
    meet_warp([](Thread*) {});  // all values are posted
    result = *static_cast<float*>(warp()[(thread_ % 32) ^ lane].slot);
    meet_warp([](Thread*) {});  // all have read
    return result;
  }

  // Lane 8 i + r gives the address of row r of matrix i; lane 4 r + q gets elements 2 q, 2 q + 1 of row r (of column r
  // if transposed).
  template <bool transposed>
  void load_matrices(uint32_t (&words)[4], uint32_t from) {
    block_.check(from, 16);
    state_.slot = words, state_.address = from;
    meet_warp([this](Thread* lanes) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
          uint32_t word = 0;
          for (int e = 0; e < 2; ++e) {
            const int row = transposed ? lane % 4 * 2 + e : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + e;
            uint16_t bits;
            std::memcpy(&bits, block_.shared + lanes[8 * i + row].address + column * 2, 2);
            word |= static_cast<uint32_t>(bits) << 16 * e;
          }
          static_cast<uint32_t*>(lanes[lane].slot)[i] = word;
        }
      }
    });
  }

  template <class Element>
  void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Operands {
      float* c;
      const uint32_t* a;
      uint32_t b[2];
    } operands{c, a, {b0, b1}};
    state_.slot = &operands;
    meet_warp([](Thread* lanes) {
      auto of = [&](int lane) { return static_cast<Operands*>(lanes[lane].slot); };
      constexpr bool narrow = Element::kNarrowRange;
      float left[16][16], right[16][8];
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 8; ++i) {
          const int row = lane / 4 + i / 2 % 2 * 8, k = lane % 4 * 2 + i % 2 + i / 4 * 8;
          left[row][k] = element(of(lane)->a[i / 2] >> 16 * (i % 2), narrow);
        }
        for (int i = 0; i < 4; ++i) {
          right[lane % 4 * 2 + i % 2 + i / 2 * 8][lane / 4] = element(of(lane)->b[i / 2] >> 16 * (i % 2), narrow);
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
          double sum = of(lane)->c[i];
          for (int k = 0; k < 16; ++k) sum += double{left[lane / 4 + i / 2 * 8][k]} * right[k][lane % 4 * 2 + i % 2];
          of(lane)->c[i] = static_cast<float>(sum);
        }
      }
    });
  }

  uint64_t descriptor(uint32_t offset) const { return lk::panel_descriptor(BlockState::kBase + offset); }
  template <int n>
  void begin_products(float (&)[n]) {}
  template <class Element, int n>
  void product(float (&c)[n / 2], uint64_t a, uint64_t b) {
    state_.products.push_back({c, nullptr, a, b, n, Element::kNarrowRange});
  }
  template <class Element>
  void transposed_product(float (&c)[32], const uint32_t* a, uint64_t b) {
    state_.products.push_back({c, a, 0, b, 64, Element::kNarrowRange});
  }
  void commit_products() {
    group().meet([this] { if (launch_.scheduler->coin()) execute_products(); });
  }
  template <int n>
  void finish_products(float (&)[n]) {
    if (!state_.products.empty()) group().meet([this] { execute_products(); });
  }
  template <int n>
  void keep(uint32_t (&)[n]) {}

 private:
  Thread* warp() const { return block_.threads + thread_ / 32 * 32; }
  Barrier& group() const { return block_.groups[thread_ / 128]; }
  void meet_warp(const std::function<void(Thread*)>& act) {
    block_.warps[thread_ / 32].meet([&] { act(warp()); });
  }

  // All products that the warpgroup has issued, for its 128 threads.
  void execute_products() {
    Thread* threads = block_.threads + thread_ / 128 * 128;
    for (size_t p = 0; p < threads[0].products.size(); ++p) {
      const Product& first = threads[0].products[p];
      float left[64][16], right[16][64];
      for (int t = 0; t < 128; ++t) {
        const Product& own = threads[t].products.at(p);
        if (own.b_descriptor != first.b_descriptor || own.a_descriptor != first.a_descriptor) {
          throw std::runtime_error("threads of a warpgroup disagree on a product");
        }
        for (int i = 0; i < 8 && own.a != nullptr; ++i) {
          const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, k = t % 4 * 2 + i % 2 + i / 4 * 8;
          left[row][k] = element(own.a[i / 2] >> 16 * (i % 2), first.narrow);
        }
      }
      for (int k = 0; k < 16; ++k) {
        for (int m = 0; m < 64 && first.a == nullptr; ++m) {
          left[m][k] = block_.operand(first.a_descriptor, m, k, first.narrow);
        }
        for (int n = 0; n < first.n; ++n) {  // a from registers: b is transposed
          right[k][n] = first.a == nullptr ? block_.operand(first.b_descriptor, n, k, first.narrow)
                                           : block_.operand(first.b_descriptor, k, n, first.narrow);
        }
      }
      for (int t = 0; t < 128; ++t) {
        for (int i = 0; i < first.n / 2; ++i) {
          const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
          double sum = threads[t].products[p].c[i];
          for (int k = 0; k < 16; ++k) sum += double{left[row][k]} * right[k][column];
          threads[t].products[p].c[i] = static_cast<float>(sum);
        }
      }
    }
    for (int t = 0; t < 128; ++t) threads[t].products.clear();
  }

  Launch& launch_;
  const int thread_, rank_;
  BlockState& block_;
  Thread& state_;
  int64_t ticket_ = 0;
};

// Runs body(machine) on every thread of every cluster of `ranks` blocks, cluster by cluster in random order.
template <class Body>
void launch(int threads, int ranks, int64_t clusters, uint32_t shared_bytes, uint64_t seed, Body body) {
  std::vector<int64_t> order(clusters);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
  for (const int64_t cluster : order) {
    Launch grid(threads, ranks, cluster * ranks, clusters, shared_bytes);
    grid.run(seed + cluster, [&](int index) {
      Machine machine(grid, index);
      body(machine);
    });
  }
}

}  // namespace emulator
