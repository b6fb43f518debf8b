// Where a consumer of the Hopper kernel is in its row of steps, and what it holds. The order of members
// decides in which order ptxas puts instructions: what was measured is this one.
#pragma once
#include "attention/key_tiles.cuh"
#include "ptx/mbarrier.cuh"

namespace fm {

template <class Params, class Smem, class Steps, class KeyTiles>
struct AttentionWalkSm90 {
  typename Smem::RingQ q;  // the next buffer of each ring
  typename Smem::RingKV v, k;
  typename Smem::RingWork works;
  int now = 0;             // the record of the tile that step n belongs to
  Steps steps;             // of that tile
  int n;                   // the step whose scores are at hand
  FM_DEVICE int tile(const Params& p) const { return KeyTiles::tile(p, n); }
  FM_DEVICE bool in_band(const Params& p, int step) const { return steps.whole(KeyTiles::tile(p, step)); }
  FM_DEVICE bool whole(const Params& p, int step, int consumer) const {
    return KeyTiles::whole(p, step, consumer) && in_band(p, step);
  }
};

// What the sums of a consumer are, one of three: nothing (fresh), those of the tile that step n belongs to
// (neither), or all of the tile before, which is written while the next product with K runs (both).
template <class RingWork, class Outside>
struct AttentionHeldSm90 {
  RingWork done;         // the next tile to be written
  Outside outside;       // of the V tile of step n
  bool fresh = true;     // the next product with V overwrites it,
  bool pending = false;  // but first it is written
};

// kInside: one of many steps inside a tile, in the band, with nothing to be written. kMasked: some of its
// scores may be hidden, there by a boolean mask alone.
template <bool kInside_, bool kMasked_>
struct StepKind {
  static constexpr bool kInside = kInside_, kMasked = kMasked_;
};

// Lets tiles pass that have no rows for the consumer, to the next one that has some. False: there is none.
// take_turn() takes the consumer's turn of a step and passes it on.
template <bool kPasses, class Work, class Rings, class Walk, class Held, class F>
FM_DEVICE bool find_rows(const Work* s_works, const Rings& rings, int consumer, Walk& at, Held& held,
                         F&& take_turn) {
  for (;; at.works.advance(), at.q.advance(), held.done.advance()) {
    rings.work.wait_full(at.works);
    const Work& w = s_works[at.works.stage];
    if (w.n_end == 0) return false;
    if (!kPasses || !w.steps[consumer].none()) break;
    rings.q(consumer).wait_full(at.q);
    rings.q(consumer).release(at.q);
    for (int n = w.n_end - w.n_begin; n > 0; --n) {
      rings.k.skip(at.k, 1, take_turn);
      rings.v.skip(at.v, 1, [] {});
    }
    mbarrier_arrive(rings.work.empty(at.works.stage));
  }
  at.now = at.works.stage;
  at.steps = s_works[at.now].steps_of(consumer);
  at.n = at.steps.end - 1;
  at.works.advance();
  held.fresh = true, held.pending = false;
  return true;
}

}  // namespace fm
