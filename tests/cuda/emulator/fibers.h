// Threads of a GPU as fibers of one host thread: who runs next is drawn at random, from a seed.
#pragma once

#include <ucontext.h>

#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
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
      ready_.push_back(i);
    }
  }
  void run() {
    while (!ready_.empty()) {
      std::swap(ready_[random() % ready_.size()], ready_.back());
      current_ = ready_.back();
      ready_.pop_back();
      swapcontext(&main_, &fibers_[current_].context);
      if (failure_) std::rethrow_exception(failure_);
    }
    if (finished_ != static_cast<int>(fibers_.size())) throw std::runtime_error("deadlock: threads wait for ever");
  }
  int current() const { return current_; }
  void sleep() { swapcontext(&fibers_[current_].context, &main_); }
  void wake(int fiber) { ready_.push_back(fiber); }
  void give_way() {  // others may run first
    wake(current_);
    sleep();
  }
  bool coin() { return random() & 1; }

  std::mt19937_64 random;

 private:
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
  std::vector<int> ready_;
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
