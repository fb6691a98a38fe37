// Launches on the current device. No torch, no Python: addresses and a stream.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "updates.h"

namespace lk {

// A CUDA error, with the name of the kernel or call it came from.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Why the current device cannot be served, empty if it can.
std::string refusal();

// Blocks of the cluster that serves aligned sketches of this shape, and such clusters at once; zeros where none does.
std::pair<int, int> cluster(int64_t d, int64_t m, bool fp16);

// Floats of device memory that `flush` needs for these sketches.
int64_t workspace_floats(const std::vector<Sketch>& sketches, bool fp16, bool deterministic);

// Issues every update: all Gram matrices in as few launches as their table allows, then the sketches. Waits for
// nothing. Deterministic: every accumulator gets its sums in an order that is the same in every run.
void flush(const std::vector<Gram>& grams, const std::vector<Sketch>& sketches, bool fp16, uint64_t workspace,
           bool deterministic, uint64_t stream);

}  // namespace lk
