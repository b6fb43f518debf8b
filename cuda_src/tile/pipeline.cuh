// Rings of buffers in shared memory between a producer and its consumers: each buffer has a barrier that says
// it is full and one that says it is empty. Both sides walk the ring with a Ring of their own.
#pragma once
#include "ptx/mbarrier.cuh"

namespace fm {

template <int kStages>
struct Ring {
  int stage = 0;
  u32 parity = 0;
  FM_DEVICE void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  // The stage before this one.
  FM_DEVICE int before() const { return stage == 0 ? kStages - 1 : stage - 1; }
};

// The two barriers of every stage, in shared memory from s_base on.
template <int kStages>
struct RingBarriers {
  static constexpr int kBytes = 2 * 8 * kStages;
  u32 s_base;
  FM_DEVICE u32 full(int stage) const { return s_base + 8 * stage; }
  FM_DEVICE u32 empty(int stage) const { return s_base + 8 * (kStages + stage); }

  // By one thread. full_arrivals, empty_arrivals: threads that report a stage filled, or used.
  FM_DEVICE void init(u32 full_arrivals, u32 empty_arrivals) const {
    for (int i = 0; i < kStages; ++i)
      mbarrier_init(full(i), full_arrivals), mbarrier_init(empty(i), empty_arrivals);
  }
  FM_DEVICE void wait_full(const Ring<kStages>& at) const { mbarrier_wait_parity(full(at.stage), at.parity); }
  FM_DEVICE bool is_full(const Ring<kStages>& at) const {
    return mbarrier_test_wait_parity(full(at.stage), at.parity);
  }
  // One lane of each warp reports that the warp is done with a stage.
  FM_DEVICE void release(const Ring<kStages>& at) const { release(at.stage); }
  FM_DEVICE void release(int stage) const {
    if (lane_id() == 0) mbarrier_arrive(empty(stage));
  }
  // Lets `count` stages pass that others need; each() is called after each of them.
  template <class F>
  FM_DEVICE void skip(Ring<kStages>& at, int count, F&& each) const {
#pragma unroll 1
    for (; count > 0; --count) {
      wait_full(at);
      release(at);
      at.advance();
      each();
    }
  }
  // The first time around every stage is empty.
  FM_DEVICE void wait_empty(const Ring<kStages>& at) const {
    mbarrier_wait_parity(empty(at.stage), at.parity ^ 1);
  }
};

}  // namespace fm
