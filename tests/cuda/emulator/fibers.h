// Threads of a GPU as fibers of one host thread. Who runs next is decided at random, from a seed, and in one of several
// manners: threads, warps, warpgroups or whole blocks have priorities, drawn anew often or rarely, so that some run far
// ahead of others. A race between blocks shows only if one of them is late by a whole step.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

namespace emulator {

// Runs fibers until all have finished. A fiber that waits is out of the queue until it is woken.
class Scheduler {
 public:
  Scheduler(int count, uint64_t seed, std::function<void(int)> body) : random(seed), body_(std::move(body)) {
    fibers_.resize(count);
    for (int i = 0; i < count; ++i) {
      fibers_[i].stack.reset(new char[kStackBytes]);
      getcontext(&fibers_[i].context);
      fibers_[i].context.uc_stack.ss_sp = fibers_[i].stack.get();
      fibers_[i].context.uc_stack.ss_size = kStackBytes;
      fibers_[i].context.uc_link = &main_;
      makecontext(&fibers_[i].context, reinterpret_cast<void (*)()>(&Scheduler::enter), 2,
                  static_cast<unsigned>(reinterpret_cast<uintptr_t>(this)),
                  static_cast<unsigned>(reinterpret_cast<uintptr_t>(this) >> 32));
    }
    constexpr int kUnits[] = {1, 32, 128, 256};
    unit_ = kUnits[random() % 4];
    period_ = 16 << random() % 12;
    priorities_.resize(count / unit_ + 1);
    for (int i = 0; i < count; ++i) ready_.push_back({0, i});
    draw_priorities();
  }
  void run() {
    while (!ready_.empty()) {
      if (random() % period_ == 0) draw_priorities();
      std::pop_heap(ready_.begin(), ready_.end());
      current_ = ready_.back().second;
      ready_.pop_back();
      swapcontext(&main_, &fibers_[current_].context);
      if (failure_) std::rethrow_exception(failure_);
    }
    if (finished_ != static_cast<int>(fibers_.size())) throw std::runtime_error("deadlock: threads wait for ever");
  }
  int current() const { return current_; }
  void sleep() { swapcontext(&fibers_[current_].context, &main_); }
  void wake(int fiber) {
    ready_.push_back({priority(fiber), fiber});
    std::push_heap(ready_.begin(), ready_.end());
  }
  void give_way() {  // others may run first
    wake(current_);
    sleep();
  }
  bool coin() { return random() & 1; }

  std::mt19937_64 random;

 private:
  uint64_t priority(int fiber) { return priorities_[fiber / unit_] << 32 | random() >> 32; }
  void draw_priorities() {
    for (uint64_t& unit : priorities_) unit = random();
    for (auto& entry : ready_) entry.first = priority(entry.second);
    std::make_heap(ready_.begin(), ready_.end());
  }

  static constexpr size_t kStackBytes = 64 << 10;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
  };
  static void enter(unsigned low, unsigned high) {
    auto* self = reinterpret_cast<Scheduler*>(static_cast<uintptr_t>(low) | static_cast<uintptr_t>(high) << 32);
    try {
      self->body_(self->current_);
      ++self->finished_;
    } catch (...) {
      self->failure_ = std::current_exception();
    }
  }

  std::function<void(int)> body_;
  std::vector<Fiber> fibers_;
  std::vector<std::pair<uint64_t, int>> ready_;  // a heap of priorities and fibers
  std::vector<uint64_t> priorities_;             // of units of `unit_` fibers
  int unit_, period_;
  ucontext_t main_;
  int current_ = 0, finished_ = 0;
  std::exception_ptr failure_;
};

// A meeting point of a fixed number of threads. The last one to arrive acts before the others go on.
class Barrier {
 public:
  void init(Scheduler* scheduler, int expected) { scheduler_ = scheduler, expected_ = expected; }
  int64_t arrive(const std::function<void()>& act = {}) {
    const int64_t ticket = generation_;
    if (++arrived_ == expected_) {
      if (act) act();
      arrived_ = 0;
      ++generation_;
      for (int fiber : waiting_) scheduler_->wake(fiber);
      waiting_.clear();
    }
    return ticket;
  }
  void wait(int64_t ticket) {
    if (generation_ > ticket) return;
    waiting_.push_back(scheduler_->current());
    scheduler_->sleep();
  }
  void meet(const std::function<void()>& act = {}) { wait(arrive(act)); }

 private:
  Scheduler* scheduler_ = nullptr;
  int expected_ = 0, arrived_ = 0;
  int64_t generation_ = 0;
  std::vector<int> waiting_;
};

}  // namespace emulator
