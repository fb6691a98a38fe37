// gram_sketch_ on Hopper: Y += alpha * X^T (X Omega), X read from device memory once.
//
// A cluster of thread blocks takes `Tiling::kTokens` rows of X at a time; each block keeps its share of the columns in
// shared memory. Both products run on the tensor cores from there, transposed so that the columns of Omega are M = 64:
//
//     Z^T [m, tokens]   = Omega^T [m, columns] X^T [columns, tokens]      a part of the sum in every block
//     Y^T [m, columns] += Z^T [m, tokens] X [tokens, columns]             accumulated in registers to the very end
//
// Between them the blocks sum Z over distributed shared memory: each block sums an equal share of the units (layout.h)
// and sends the sums to all, in an order that is the same in every run. Z stays in the layout of the accumulator
// registers, which is also that of the left operand: no shuffles and no swizzles.
//
// Omega and Z are fp32 and enter the products as a high and a low element each. In fp16, whose range is narrow, they
// are scaled by powers of two per column of Omega, as large as the data seen so far allows.
//
// Masked rows are never loaded; their place is filled with zeros, as is everything beyond T and d.
//
// The body is a template over the machine it runs on: a GPU (machine.cuh) or an emulation of one on the host
// (tests/cuda/emulator). It has run on the emulation only, never yet on a GPU.
#pragma once

#include "layout.h"
#include "updates.h"

namespace lk {

// Compile-time shape of the kernel. `blocks` of 64 columns of Omega; `panels` of 64 columns of X per thread block.
template <int blocks, int panels, int tokens, int stages>
struct Tiling {
  static constexpr int kBlocks = blocks, kPanels = panels, kTokens = tokens, kStages = stages;
  static constexpr int kGroups = 2;  // warpgroups
  static constexpr int kThreads = kGroups * 128;
  static constexpr int kGroupPanels = panels / kGroups;  // panels of Y a warpgroup accumulates
  static constexpr int kMaxRanks = 16;

  // One block of Omega: the warpgroups share the panels of the first product and both have a part of Z. Two blocks: one
  // for each warpgroup.
  static constexpr int kContributions = blocks == 1 ? kGroups : 1;  // parts of Z from each thread block
  static constexpr int kUnitThreads = blocks * 128;
  static constexpr int kUnits = kUnitThreads * tokens / 8;

  static constexpr uint32_t kPanelBytes = tokens * kRowBytes;  // of X
  static constexpr uint32_t kStageBytes = panels * kPanelBytes;
  static constexpr uint32_t kOmegaPanelBytes = 64 * kRowBytes;
  static constexpr uint32_t kZBytes = kUnits * sizeof(Quad);

  static constexpr uint32_t kOmega = 0;  // [panel][block][high, low][64 columns of Omega][64 columns of X]
  static constexpr uint32_t kX = kOmega + panels * blocks * 2 * kOmegaPanelBytes;  // [stage][panel][token][64]
  static constexpr uint32_t kZ = kX + stages * kStageBytes;                        // [2][unit]
  static constexpr uint32_t kParts = kZ + 2 * kZBytes;  // [contributor][unit of this rank]
  static constexpr uint32_t kScales = kParts + kContributions * kZBytes;  // [2][64 * blocks]
  static constexpr uint32_t kSharedBytes = kScales + 2 * 64 * blocks * sizeof(float);

  LK_FN static constexpr uint32_t omega_panel(int panel, int block, int part) {
    return kOmega + static_cast<uint32_t>((panel * blocks + block) * 2 + part) * kOmegaPanelBytes;
  }
  LK_FN static constexpr uint32_t x_panel(int64_t step, int panel) {
    return kX + static_cast<uint32_t>(step % stages) * kStageBytes + static_cast<uint32_t>(panel) * kPanelBytes;
  }
  LK_FN static constexpr uint32_t z_unit(int64_t step, int unit) {
    return kZ + static_cast<uint32_t>(step % 2) * kZBytes + static_cast<uint32_t>(unit * sizeof(Quad));
  }
  // [contributor][slot]: every rank has kUnits / ranks slots for each of ranks * kContributions contributors.
  LK_FN static constexpr uint32_t part_unit(int contributor, int slot, int ranks) {
    return kParts + static_cast<uint32_t>((contributor * (kUnits / ranks) + slot) * sizeof(Quad));
  }

  static_assert(tokens % 16 == 0 && panels % kGroups == 0 && (blocks == 1 || blocks == 2), "");
  static_assert(kPanelBytes % 1024 == 0 && kX % 1024 == 0, "swizzled panels start at multiples of 1024 bytes");
  static_assert(kUnits % kMaxRanks == 0, "every rank of a cluster sums the same number of units");
  static_assert(kSharedBytes <= 232448, "shared memory of sm_90");
};

// The kernel of one thread. Element is Bf16 or Fp16.
template <class Element, class Tiling, class Machine>
class SketchCluster {
 public:
  // plane: floats of a plane, of which each cluster has one, at y; 0: clusters add to y, in any order.
  LK_FN SketchCluster(Machine& machine, const Sketch& sketch, int64_t plane)
      : machine_(machine),
        sketch_(sketch),
        plane_(plane),
        thread_(machine.thread()),
        group_(machine.thread() / 128),
        first_(machine.rank() * columns_per_rank(sketch.d, machine.ranks())),
        last_(smaller(first_ + columns_per_rank(sketch.d, machine.ranks()), sketch.d)) {}

  LK_FN void run() {
    const int64_t blocks = ceil_div(sketch_.tokens, Tiling::kTokens);
    steps_ = blocks <= machine_.cluster() ? 0 : ceil_div(blocks - machine_.cluster(), machine_.clusters());
    for (int stage = 0; stage < Tiling::kStages; ++stage) load(stage);
    load_omega();
    machine_.cluster_arrive();  // no block writes to another one's shared memory before that one has started
    machine_.cluster_wait();
    clear();

    if (steps_ > 0) project(0);
    machine_.cluster_arrive();
    machine_.cluster_wait();
    if (steps_ > 0) sum(0);
    machine_.cluster_arrive();
    machine_.cluster_wait();
    for (int64_t step = 0; step < steps_; ++step) {
      const bool more = step + 1 < steps_;
      if (more) project(step + 1);
      machine_.cluster_arrive();  // parts of Z of the next step are on their way
      start_accumulating(step);
      machine_.cluster_wait();
      if (more) sum(step + 1);
      finish_accumulating();
      machine_.cluster_arrive();  // the next Z is complete, the sums are read, this step's stage is free
      machine_.cluster_wait();
      load(step + Tiling::kStages);
    }
    store();
  }

 private:
  // Starts copying the rows of a step to its stage. Every step is one group of copies, even beyond the last.
  LK_FN void load(int64_t step) {
    if (step < steps_) {
      const int64_t token0 = (machine_.cluster() + step * machine_.clusters()) * Tiling::kTokens;
      const auto* x = reinterpret_cast<const uint16_t*>(sketch_.x);
      const auto* mask = reinterpret_cast<const uint8_t*>(sketch_.mask);
      constexpr int kChunks = Tiling::kPanels * 8;  // of 16 bytes per row
      constexpr int kCopies = kChunks * Tiling::kTokens / Tiling::kThreads;
      static_assert(kCopies * Tiling::kThreads == kChunks * Tiling::kTokens, "every thread copies as much");
      auto chunk_of = [&](int i) { return thread_ + i * Tiling::kThreads; };
      auto token_of = [&](int i) { return token0 + chunk_of(i) / kChunks; };
      int bytes[kCopies];
      LK_UNROLL
      for (int i = 0; i < kCopies; ++i) {
        const int64_t column = first_ + chunk_of(i) % kChunks * kChunkElements;
        bytes[i] = token_of(i) < sketch_.tokens ? chunk_bytes(column, last_, 2) : 0;
      }
      drop_masked(bytes, mask, sketch_.tokens, token_of);
      LK_UNROLL
      for (int i = 0; i < kCopies; ++i) {
        const int row = chunk_of(i) / kChunks, place = chunk_of(i) % kChunks;
        const uint16_t* from = x + (token0 + row) * sketch_.x_stride + first_ + place * kChunkElements;
        machine_.copy_async(Tiling::x_panel(step, place / 8) + swizzled(row, place % 8 * kChunkBytes),
                            bytes[i] > 0 ? from : x, bytes[i]);
      }
    }
    machine_.commit_copies();
  }

  // Omega^T, in two parts, to shared memory, for the whole run.
  LK_FN void load_omega() {
    if constexpr (Element::kNarrowRange) scale_omega();
    constexpr int kRows = 64 * Tiling::kBlocks;
    for (int i = thread_; i < kRows * Tiling::kPanels * 32; i += Tiling::kThreads) {
      const int row = i % kRows, pair = i / kRows;  // consecutive threads read consecutive columns of Omega
      const int panel = pair / 32, offset = pair % 32 * 2;
      const float scale = Element::kNarrowRange ? scales(0)[row] : 1.0f;
      uint32_t part[2];
      split<Element>(scale * omega(row, panel * kPanelColumns + offset),
                     scale * omega(row, panel * kPanelColumns + offset + 1), part[0], part[1]);
      for (int p = 0; p < 2; ++p) {
        machine_.store(Tiling::omega_panel(panel, row / 64, p) + swizzled(row % 64, offset * 2), part[p]);
      }
    }
    machine_.fence_async();
  }

  // fp16: brings each column of Omega, as far as this block has it, near 2^12; what it takes is undone in `project`.
  LK_FN void scale_omega() {
    constexpr int kRows = 64 * Tiling::kBlocks, kScans = Tiling::kThreads / kRows;
    const int row = thread_ % kRows, scan = thread_ / kRows;
    float largest = 0.0f;
    for (int column = scan; column < Tiling::kPanels * kPanelColumns; column += kScans) {
      const float magnitude = fabsf(omega(row, column));
      largest = magnitude > largest ? magnitude : largest;
    }
    auto* scratch = reinterpret_cast<float*>(machine_.shared() + Tiling::kParts);
    scratch[thread_] = largest;
    machine_.sync();
    if (thread_ < kRows) {
      for (int other = thread_ + kRows; other < Tiling::kThreads; other += kRows) {
        largest = scratch[other] > largest ? scratch[other] : largest;
      }
      const int exponent = exponent_above(largest) - kTarget;
      scales(0)[row] = power_of_two(-exponent);
      scales(1)[row] = power_of_two(exponent);
    }
    machine_.sync();
  }

  LK_FN float omega(int row, int column) const {
    const int64_t global = first_ + column;
    if (row >= sketch_.m || global >= last_) return 0.0f;
    return reinterpret_cast<const float*>(sketch_.omega)[global * sketch_.omega_stride + row];
  }
  LK_FN float* scales(int which) const {
    return reinterpret_cast<float*>(machine_.shared() + Tiling::kScales) + which * 64 * Tiling::kBlocks;
  }

  // This block's part of Z^T for a step, sent unit by unit to the ranks that sum it.
  LK_FN void project(int64_t step) {
    machine_.template wait_copies<Tiling::kStages - 2>();
    machine_.fence_async();
    machine_.sync();
    constexpr bool kSharePanels = Tiling::kBlocks == 1;
    const int block = kSharePanels ? 0 : group_;
    const int panel0 = kSharePanels ? group_ * Tiling::kGroupPanels : 0;
    constexpr int kCount = kSharePanels ? Tiling::kGroupPanels : Tiling::kPanels;
    float z[Tiling::kTokens / 2];
    LK_UNROLL
    for (int i = 0; i < Tiling::kTokens / 2; ++i) z[i] = 0.0f;
    machine_.begin_products(z);
    LK_UNROLL
    for (int panel = panel0; panel < panel0 + kCount; ++panel) {
      LK_UNROLL
      for (int k = 0; k < 4; ++k) {  // 16 columns, 32 bytes, at a time
        const uint64_t x = machine_.descriptor(Tiling::x_panel(step, panel) + k * 32);
        LK_UNROLL
        for (int part = 0; part < 2; ++part) {
          const uint64_t w = machine_.descriptor(Tiling::omega_panel(panel, block, part) + k * 32);
          machine_.template product<Element, Tiling::kTokens>(z, w, x);
        }
      }
    }
    machine_.commit_products();
    machine_.finish_products(z);

    const int thread = kSharePanels ? thread_ % 128 : thread_;
    const int contributor = machine_.rank() * Tiling::kContributions + (kSharePanels ? group_ : 0);
    float scale[2] = {1.0f, 1.0f};  // of a thread's two rows
    if constexpr (Element::kNarrowRange) {
      scale[0] = scales(1)[block * 64 + fragment_row(thread_, 0)];
      scale[1] = scales(1)[block * 64 + fragment_row(thread_, 2)];
    }
    LK_UNROLL
    for (int quad = 0; quad < Tiling::kTokens / 8; ++quad) {
      const int unit = unit_of(quad, thread, Tiling::kUnitThreads), ranks = machine_.ranks();
      const Quad values{{z[4 * quad] * scale[0], z[4 * quad + 1] * scale[0], z[4 * quad + 2] * scale[1],
                         z[4 * quad + 3] * scale[1]}};
      machine_.store_remote(unit_owner(unit, Tiling::kUnits, ranks),
                            Tiling::part_unit(contributor, unit_slot(unit, Tiling::kUnits, ranks), ranks), values);
    }
  }

  // Sums this rank's units of Z over all contributors, in order, and sends them to every rank.
  LK_FN void sum(int64_t step) {
    const int ranks = machine_.ranks(), units = Tiling::kUnits / ranks;
    for (int slot = thread_; slot < units; slot += Tiling::kThreads) {
      Quad total{{0.0f, 0.0f, 0.0f, 0.0f}};
      for (int contributor = 0; contributor < ranks * Tiling::kContributions; ++contributor) {
        const Quad part =
            *reinterpret_cast<const Quad*>(machine_.shared() + Tiling::part_unit(contributor, slot, ranks));
        LK_UNROLL
        for (int i = 0; i < 4; ++i) total.value[i] += part.value[i];
      }
      const uint32_t place = Tiling::z_unit(step, machine_.rank() * units + slot);
      for (int rank = 0; rank < ranks; ++rank) machine_.store_remote(rank, place, total);
    }
  }

  LK_FN void clear() {
    LK_UNROLL
    for (int block = 0; block < Tiling::kBlocks; ++block) {
      exponent_[block][0] = exponent_[block][1] = -112 - kTarget;
      LK_UNROLL
      for (int panel = 0; panel < Tiling::kGroupPanels; ++panel) {
        LK_UNROLL
        for (int i = 0; i < 32; ++i) y_[block][panel][i] = 0.0f;
      }
    }
  }

  // Y^T += Z^T X for a step: issues the products and returns.
  LK_FN void start_accumulating(int64_t step) {
    LK_UNROLL
    for (int block = 0; block < Tiling::kBlocks; ++block) {
      float z[Tiling::kTokens / 2];
      LK_UNROLL
      for (int quad = 0; quad < Tiling::kTokens / 8; ++quad) {
        const int unit = unit_of(quad, block * 128 + thread_ % 128, Tiling::kUnitThreads);
        const Quad values = *reinterpret_cast<const Quad*>(machine_.shared() + Tiling::z_unit(step, unit));
        LK_UNROLL
        for (int i = 0; i < 4; ++i) z[4 * quad + i] = values.value[i];
      }
      if constexpr (Element::kNarrowRange) rescale(block, z);
      LK_UNROLL
      for (int i = 0; i < Tiling::kTokens / 4; ++i) {
        split<Element>(z[2 * i], z[2 * i + 1], z_[block][0][i], z_[block][1][i]);
      }
    }
    begin_products();
    LK_UNROLL
    for (int panel = 0; panel < Tiling::kGroupPanels; ++panel) {
      const uint32_t place = Tiling::x_panel(step, group_ * Tiling::kGroupPanels + panel);
      LK_UNROLL
      for (int k = 0; k < Tiling::kTokens / 16; ++k) {  // 16 tokens, 2048 bytes, at a time
        const uint64_t x = machine_.descriptor(place + k * 16 * kRowBytes);
        LK_UNROLL
        for (int block = 0; block < Tiling::kBlocks; ++block) {
          LK_UNROLL
          for (int part = 0; part < 2; ++part) {
            machine_.template transposed_product<Element>(y_[block][panel], &z_[block][part][4 * k], x);
          }
        }
      }
    }
    machine_.commit_products();
  }

  LK_FN void begin_products() {
    LK_UNROLL
    for (int block = 0; block < Tiling::kBlocks; ++block) {
      machine_.keep(z_[block][0]);
      machine_.keep(z_[block][1]);
      LK_UNROLL
      for (int panel = 0; panel < Tiling::kGroupPanels; ++panel) machine_.begin_products(y_[block][panel]);
    }
  }

  LK_FN void finish_accumulating() {
    LK_UNROLL
    for (int block = 0; block < Tiling::kBlocks; ++block) {
      LK_UNROLL
      for (int panel = 0; panel < Tiling::kGroupPanels; ++panel) machine_.finish_products(y_[block][panel]);
      machine_.keep(z_[block][0]);
      machine_.keep(z_[block][1]);
    }
  }

  // fp16: a row of Z^T is scaled to stay below 2^12 (its largest element so far is above 2^11). When a larger element
  // turns up, what has been accumulated for the row is scaled down to match, exactly.
  LK_FN void rescale(int block, float (&z)[Tiling::kTokens / 2]) {
    LK_UNROLL
    for (int half = 0; half < 2; ++half) {  // the thread's two rows
      float largest = 0.0f;
      LK_UNROLL
      for (int i = 0; i < Tiling::kTokens / 2; ++i) {
        const float magnitude = fabsf(z[i]);
        if (i / 2 % 2 == half) largest = magnitude > largest ? magnitude : largest;
      }
      for (int lane = 1; lane < 4; lane *= 2) {  // the four threads that share the row
        const float other = machine_.shuffle_xor(largest, lane);
        largest = other > largest ? other : largest;
      }
      const int before = exponent_[block][half], now = exponent_above(largest) - kTarget;
      if (now > before) {
        const float factor = power_of_two(before - now);
        LK_UNROLL
        for (int panel = 0; panel < Tiling::kGroupPanels; ++panel) {
          LK_UNROLL
          for (int i = 0; i < 32; ++i) {
            if (i / 2 % 2 == half) y_[block][panel][i] *= factor;
          }
        }
        exponent_[block][half] = now;
      }
      const float scale = power_of_two(-exponent_[block][half]);
      LK_UNROLL
      for (int i = 0; i < Tiling::kTokens / 2; ++i) {
        if (i / 2 % 2 == half) z[i] *= scale;
      }
    }
  }

  LK_FN void store() {
    auto* y = reinterpret_cast<float*>(sketch_.y) + machine_.cluster() * plane_;
    LK_UNROLL
    for (int block = 0; block < Tiling::kBlocks; ++block) {
      LK_UNROLL
      for (int panel = 0; panel < Tiling::kGroupPanels; ++panel) {
        const int64_t column0 = first_ + (group_ * Tiling::kGroupPanels + panel) * kPanelColumns;
        LK_UNROLL
        for (int i = 0; i < 32; ++i) {
          const int row = block * 64 + fragment_row(thread_, i);
          const int64_t column = column0 + fragment_column(thread_, i);
          float value = sketch_.alpha * y_[block][panel][i];
          if constexpr (Element::kNarrowRange) value *= power_of_two(exponent_[block][i / 2 % 2]);
          if (row < sketch_.m && column < last_) put_sum(machine_, y + column * sketch_.y_stride + row, value, plane_);
        }
      }
    }
  }

  static constexpr int kTarget = 12;  // fp16 operands are scaled to just below 2^12

  Machine& machine_;
  const Sketch& sketch_;
  const int64_t plane_;
  const int thread_, group_;
  const int64_t first_, last_;  // this block's columns
  int64_t steps_ = 0;
  float y_[Tiling::kBlocks][Tiling::kGroupPanels][32];
  uint32_t z_[Tiling::kBlocks][2][Tiling::kTokens / 4];  // high and low part of Z^T, left operand
  int exponent_[Tiling::kBlocks][2];
};

}  // namespace lk
