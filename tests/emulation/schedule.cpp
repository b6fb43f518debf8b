// Who goes on, and when what runs beside the threads takes effect: all that a seed decides.
#include <stdio.h>

#include <map>

#include "runtime.hpp"

namespace emu {

u64 draw() {
  u64 z = run->random += 0x9e3779b97f4a7c15ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}

Policy policy_of(u64 seed) {
  constexpr When now = When::now, last = When::last;
  if (seed == 0) return {now, now, now, now, 0, 0, false, false, false};
  if (seed == 1) return {last, last, last, last, 0, 0, false, true, false};
  if (seed == 2) return {now, last, last, last, 0x1000, 0, false, true, false};
  if (seed == 3) return {last, now, now, now, 0x1000, 0, true, true, true};
  const auto any = [] { return static_cast<When>(draw() % 3); };
  const u32 pauses[] = {0, 0x400, 0x2000}, steps[] = {0x8000, 0x1000, 0x200};
  return {any(), any(), any(), any(), pauses[draw() % 3], steps[draw() % 3], draw() % 2 == 0, true, draw() % 2 == 0};
}

// Something that runs beside the threads happens, whether anybody waits for it or not. False: nothing is under way.
bool step(bool only_later) {
  const auto may = [&](When when) { return !only_later || when == When::later; };
  const u32 kinds = static_cast<u32>(draw() % 4);
  for (u32 i = 0; i < 4; ++i) switch ((kinds + i) % 4) {
      case 0:
        if (run->loads.empty() || !may(run->policy.loads)) break;
        {
          const size_t which = run->policy.shuffled ? draw() % run->loads.size() : 0;
          const Load load = run->loads[which];
          run->loads.erase(run->loads.begin() + static_cast<std::ptrdiff_t>(which));
          run_load(load);
        }
        return true;
      case 1:
        if (run->arrivals.empty() || !may(run->policy.copies)) break;
        {
          const size_t which = run->policy.shuffled ? draw() % run->arrivals.size() : 0;
          const Arrival arrival = run->arrivals[which];
          run->arrivals.erase(run->arrivals.begin() + static_cast<std::ptrdiff_t>(which));
          run_arrival(arrival);
        }
        return true;
      case 2: {
        if (!only_later || run->policy.stores != When::later || run->stores.empty()) break;  // whoever waits for a store does it
        const size_t which = draw() % run->stores.size();
        Store* store = run->stores[which];
        if (!store->read) {
          read_store(*store);
        } else {
          write_store(*store);
          run->stores.erase(run->stores.begin() + static_cast<std::ptrdiff_t>(which));
          delete store;
        }
        return true;
      }
      case 3:
        if (!only_later || run->policy.products != When::later || run->live.empty()) break;  // the same
        for (Block* block : run->live[draw() % run->live.size()]->blocks)
          if (step_products(*block)) return true;
    }
  return false;
}

// Nobody is ready: those that wait as long as they can go on, or what they may be waiting for happens.
bool nothing_is_ready() {
  std::vector<Warp*> lazy;
  for (Cluster* cluster : run->live)
    for (Block* block : cluster->blocks)
      for (Warp& warp : block->warps)
        if (warp.lazy != 0) lazy.push_back(&warp);
  if (!lazy.empty() && ((draw() & 1) || !step(false))) {
    Warp& warp = *lazy[run->policy.shuffled ? draw() % lazy.size() : 0];
    const u32 lanes = warp.lazy;
    warp.lazy = 0;
    make_ready(warp, lanes);
    return true;
  }
  return !lazy.empty() || step(false);
}

Warp* pick() {
  if (run->ready.empty()) return nullptr;
  size_t which = 0;
  if (run->policy.priorities) {
    if ((draw() & 63) == 0)
      for (Warp* warp : run->ready) warp->priority = static_cast<u32>(draw());
    for (size_t i = 1; i < run->ready.size(); ++i)
      if (run->ready[i]->priority > run->ready[which]->priority) which = i;
  } else if (run->policy.shuffled) {
    which = draw() % run->ready.size();
  }
  Warp* warp = run->ready[which];
  run->ready.erase(run->ready.begin() + static_cast<std::ptrdiff_t>(which));
  warp->listed = false;
  return warp;
}

void run_warp(Warp& warp) {
  const bool downwards = run->policy.shuffled && (draw() & 1);
  warp.paused = false;
  warp.listed = true;  // not again while it runs
  while (warp.ready != 0 && !warp.paused && !expired) {
    const int lane = downwards ? 31 - __builtin_clz(warp.ready) : __builtin_ctz(warp.ready);
    warp.ready &= ~(1u << lane);
    run_fiber(warp.block->fibers[warp.index * 32 + static_cast<u32>(lane)]);
  }
  warp.listed = false;
  if (warp.ready != 0) make_ready(warp, 0);
}

void deadlock(const char* what) {
  std::string text = what;
  for (Cluster* cluster : run->live)
    for (Block* block : cluster->blocks) {
      std::map<std::string, std::string> who;  // what is waited for -> warps and lanes
      for (Warp& warp : block->warps) {
        std::map<std::string, u32> lanes;
        for (u32 i = 0; i < 32; ++i)
          if (!(warp.exited >> i & 1)) lanes[describe(block->fibers[warp.index * 32 + i])] |= 1u << i;
        for (const auto& [wait, mask] : lanes) {
          char name[64];
          if (mask == kAllLanes) snprintf(name, sizeof name, " %u", warp.index);
          else if ((mask & (mask - 1)) == 0) snprintf(name, sizeof name, " %u (lane %d)", warp.index, __builtin_ctz(mask));
          else snprintf(name, sizeof name, " %u (lanes %08x)", warp.index, mask);
          who[wait] += name;
        }
      }
      for (const auto& [wait, warps] : who) text += "\n  block " + std::to_string(block->index) + ", warp" + warps + ": " + wait;
    }
  current = nullptr;
  fail("%s", text.c_str());
}

void make_ready(Warp& warp, u32 lanes) {
  warp.ready |= lanes;
  if (warp.listed || warp.ready == 0) return;
  warp.listed = true;
  run->ready.push_back(&warp);
}

void wake(Waiters& waiters) {
  for (Fiber* fiber = waiters.first; fiber != nullptr; fiber = fiber->next_waiter) make_ready(*fiber->warp, 1u << fiber->lane);
  waiters.first = nullptr;
  run->idle_polls = 0;
}

void switch_out() {
  run->idle_polls = 0;
  current->polls = 0;
  leave();
  current->waits = Waits::nothing;
}

void wait_in(Waiters& waiters, Waits waits, u64 detail0, u64 detail1) {
  current->waits = waits, current->detail[0] = detail0, current->detail[1] = detail1;
  current->next_waiter = waiters.first;
  waiters.first = current;
  switch_out();
}

void wait_for_last() {
  current->waits = Waits::last;
  current->warp->lazy |= 1u << current->lane;
  switch_out();
}

static void pause() {
  current->warp->ready |= 1u << current->lane;  // the warp runs: it is listed again afterwards
  current->warp->paused = true;
  leave();
}

void may_pause_together() {
  if (chance(run->policy.pause)) pause();
}

// Lanes that could go on go on first: on a GPU a warp would run them with this one, or has run them before. But nothing promises
// that (only __syncwarp does), and ragged runs do it otherwise.
void may_pause() {
  if ((run->policy.ragged || current->warp->ready == 0) && chance(run->policy.pause)) pause();
}

void poll() {
  ++run->idle_polls;
  pause();
}

void thread_exits() {
  Fiber& me = *current;
  Warp& warp = *me.warp;
  Block& block = *me.block;
  run_copies(me, ~0ull);
  if (me.products > block.groups[me.thread / 128].done) fail("the thread ends while wgmma products that use its registers are under way");
  for (const Meeting& one : warp.meetings)
    if (one.lanes >> me.lane & 1) fail("the thread ends while lanes %08x of its warp wait for it in %s", one.arrived, one.what);
  warp.exited |= 1u << me.lane;
  --block.alive, --block.cluster->alive;
  thread_left_barriers(block);
  switch_out();
}

std::string describe(const Fiber& fiber) {
  char text[256] = "goes on";
  Block& block = *fiber.block;
  const u32 address = static_cast<u32>(fiber.detail[0]);
  switch (fiber.waits) {
    case Waits::nothing:
      if (fiber.polls != 0) return "asks again and again";
      break;
    case Waits::lanes:
      for (const Meeting& one : fiber.warp->meetings)
        if (one.arrived >> fiber.lane & 1) snprintf(text, sizeof text, "%s, which lanes %08x have not reached", one.what, one.lanes & ~one.arrived);
      break;
    case Waits::mbarrier: {
      const Mbarrier& one = block.mbarriers[address];
      snprintf(text, sizeof text, "mbarrier at shared +0x%x, parity %llu: its phase %llu lacks %d of %u arrivals and %lld bytes", address - kBase,
               fiber.detail[1], one.phase, one.pending, one.expected, one.bytes);
      break;
    }
    case Waits::named:
      snprintf(text, sizeof text, "barrier %u, where %u of %u threads have arrived", address, block.named[address].arrived,
               block.named[address].expected);
      break;
    case Waits::block:
      snprintf(text, sizeof text, "__syncthreads, where %u of %u threads have arrived", block.all.arrived, block.alive);
      break;
    case Waits::cluster:
      snprintf(text, sizeof text, "barrier.cluster, where %u of %u threads have arrived", block.cluster->arrived, block.cluster->alive);
      break;
    case Waits::products:
      return "wgmma.wait_group, for products that not all threads of the warpgroup have issued";
    case Waits::last:
      return "something that will happen";
  }
  return text;
}

}  // namespace emu
