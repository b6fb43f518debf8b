// Where threads wait for each other: lanes of a warp, named barriers, the block, the cluster, mbarriers.
#include "runtime.hpp"

namespace emu {

void together(const char* what, u32 lanes, void* item, void (*all)(void* const* items, u32 lanes), u64 detail) {
  Fiber& me = *current;
  Warp& warp = *me.warp;
  const u32 bit = 1u << me.lane;
  if (!(lanes & bit)) fail("%s of lanes %08x, to which this lane does not belong", what, lanes);
  if (lanes & warp.exited) fail("%s of lanes %08x, of which %08x have exited", what, lanes, lanes & warp.exited);
  Meeting* found = nullptr;
  for (Meeting& one : warp.meetings) {
    if (one.lanes != lanes) continue;
    if (std::strcmp(one.what, what) != 0 || one.detail != detail)
      fail("lanes %08x of the warp are in %s (%llx), this lane comes with %s (%llx)", one.arrived, one.what, one.detail, what, detail);
    found = &one;
  }
  if (found == nullptr) {
    warp.meetings.push_back({what, detail, lanes, 0, {}});
    found = &warp.meetings.back();
  }
  found->arrived |= bit;
  found->items[me.lane] = item;
  if (found->arrived == lanes) {
    all(found->items, lanes);
    *found = warp.meetings.back();
    warp.meetings.pop_back();
    make_ready(warp, lanes & ~bit);
    may_pause_together();
  } else {
    me.waits = Waits::lanes, me.detail[0] = lanes;
    switch_out();
  }
}

void syncwarp(u32 lanes) {
  together("__syncwarp", lanes, nullptr, [](void* const*, u32) {});
  acquire();
}

// ---- barriers of the block ----

static void complete(NamedBarrier& barrier) {
  barrier.owners = barrier.waiting;
  barrier.arrived = barrier.expected = barrier.waiting = 0;
  ++barrier.generation;
  wake(barrier.waiters);
}

// A barrier belongs to the warps that wait at it: were two groups of threads to share a number, one group's arrivals could complete
// the other's generation.
static void wait_as_owner(NamedBarrier& at, u32 id, u32 warp) {
  const u32 bit = 1u << warp;
  if (at.owners != 0 && !(at.owners & bit)) fail("barrier %u has two owners: warps %x have waited at it, now warp %u does", id, at.owners, warp);
  at.waiting |= bit;
}

void barrier(u32 id, u32 threads, bool wait) {
  if (id > 15 || threads == 0 || threads % 32 != 0 || threads > run->threads) fail("barrier %u of %u threads", id, threads);
  NamedBarrier& at = current->block->named[id];
  struct Item {
    u32 id, threads, warp;
    bool wait;
    u64 generation;
  } item{id, threads, current->warp->index, wait, 0};
  together(wait ? "barrier.sync" : "barrier.arrive", kAllLanes, &item, [](void* const* items, u32) {
    const Item& first = *static_cast<Item*>(items[0]);
    NamedBarrier& at = current->block->named[first.id];
    if (at.arrived != 0 && at.expected != first.threads)
      fail("barrier %u is waited for with %u threads and with %u", first.id, at.expected, first.threads);
    at.expected = first.threads, at.arrived += 32;
    if (first.wait) wait_as_owner(at, first.id, first.warp);
    for (int i = 0; i < 32; ++i) static_cast<Item*>(items[i])->generation = at.generation;
    if (at.arrived == at.expected) complete(at);
  }, static_cast<u64>(id) << 32 | threads);
  while (wait && at.generation == item.generation) wait_in(at.waiters, Waits::named, id);
  acquire();
}

static void check_all(Block& block) {
  if (block.all.arrived != 0 && block.all.arrived == block.alive) complete(block.all);
}

void syncthreads() {
  NamedBarrier& at = current->block->all;
  const u64 generation = at.generation;
  ++at.arrived;
  check_all(*current->block);
  while (at.generation == generation) wait_in(at.waiters, Waits::block);
  acquire();
  may_pause();
}

// ---- clusters ----

static void check_cluster(Cluster& cluster) {
  if (cluster.arrived != 0 && cluster.arrived == cluster.alive) {
    cluster.arrived = 0;
    ++cluster.generation;
    wake(cluster.waiters);
  }
}

u32 cluster_rank() { return current->block->rank; }

void cluster_arrive() {
  current->cluster_ticket = current->block->cluster->generation + 1;
  together("barrier.cluster.arrive", kAllLanes, nullptr, [](void* const*, u32) {
    current->block->cluster->arrived += 32;
    check_cluster(*current->block->cluster);
  });
}

void cluster_wait() {
  Cluster& cluster = *current->block->cluster;
  if (current->cluster_ticket == 0) fail("barrier.cluster.wait without an arrival");
  while (cluster.generation < current->cluster_ticket) wait_in(cluster.waiters, Waits::cluster);
  current->cluster_ticket = 0;
  acquire();
}

u32 cluster_address(u32 address, u32 rank) {
  if (rank >= run->cluster) fail("mapa to block %u of a cluster of %u", rank, run->cluster);
  if (address >> kRankShift) fail("mapa of %08x, which is no address of this block", address);
  return address | (rank + 1) << kRankShift;
}

void thread_left_barriers(Block& block) {
  check_all(block);
  check_cluster(*block.cluster);
}

// ---- mbarriers ----

static u64 cookie(u32 address) { return 0x6d62617272696572ull ^ static_cast<u64>(address) << 20; }

Mbarrier& mbarrier_at(Block& block, u32 address, const char* what, bool asynchronous) {
  const u8* memory = shared(block, address & ((1u << kRankShift) - 1), 8, 8, what);
  const auto found = block.mbarriers.find(address & ((1u << kRankShift) - 1));
  if (found == block.mbarriers.end()) fail("%s: no mbarrier was initialised at shared +0x%x of block %u", what, address - kBase, block.index);
  u64 now;
  std::memcpy(&now, memory, 8);
  if (now != cookie(found->first)) fail("%s: the mbarrier at shared +0x%x has been overwritten", what, address - kBase);
  if (asynchronous && !found->second.fenced)
    fail("%s: the mbarrier at shared +0x%x was initialised by thread %u without fence.mbarrier_init", what, address - kBase, found->second.thread);
  return found->second;
}

void mbarrier_init(u32 address, u32 arrivals) {
  Block& block = *current->block;
  u8* memory = shared(block, address, 8, 8, "mbarrier.init");
  if (arrivals == 0 || arrivals >= 1u << 20) fail("mbarrier.init with %u arrivals", arrivals);
  if (block.mbarriers.count(address)) fail("the mbarrier at shared +0x%x is initialised twice", address - kBase);
  const u64 value = cookie(address);
  std::memcpy(memory, &value, 8);
  block.mbarriers[address] = {address, arrivals, static_cast<int>(arrivals), 0, 0, current->thread, false, {}, std::vector<u64>(run->threads)};
}

void fence_mbarrier_init() {
  for (auto& [address, barrier] : current->block->mbarriers)
    if (barrier.thread == current->thread) barrier.fenced = true;
}

static void check_phase(Mbarrier& barrier, Block& block) {
  if (barrier.pending != 0) return;
  if (barrier.bytes < 0)
    fail("%lld bytes more than announced landed at the mbarrier at shared +0x%x of block %u", -barrier.bytes, barrier.address - kBase, block.index);
  if (barrier.bytes != 0) return;
  barrier.pending = static_cast<int>(barrier.expected);
  ++barrier.phase;
  wake(barrier.waiters);
}

void arrive_at(Mbarrier& barrier, Block& block) {
  if (barrier.pending == 0)
    fail("more than %u arrivals in a phase of the mbarrier at shared +0x%x of block %u", barrier.expected, barrier.address - kBase, block.index);
  --barrier.pending;
  check_phase(barrier, block);
}

void complete_bytes(Mbarrier& barrier, Block& block, u32 bytes) {
  barrier.bytes -= bytes;
  check_phase(barrier, block);
}

void mbarrier_arrive(u32 address, bool from_cluster) {
  Block& block = block_of(address, from_cluster);
  arrive_at(mbarrier_at(block, address, "mbarrier.arrive", &block != current->block), block);
  may_pause();
}

void store_in_cluster(u32 address, u32 value, u32 barrier) {
  Block &block = block_of(address, true), &other = block_of(barrier, true);
  if (&block != &other) fail("st.async to one block that reports to another");
  std::memcpy(shared(block, address & ((1u << kRankShift) - 1), 4, 4, "st.async"), &value, 4);
  complete_bytes(mbarrier_at(block, barrier, "st.async", true), block, 4);
  may_pause();
}

void mbarrier_expect_tx(u32 address, u32 bytes) {
  if (bytes >= 1u << 20) fail("mbarrier.expect_tx of %u bytes", bytes);
  mbarrier_at(*current->block, address, "mbarrier.expect_tx", false).bytes += bytes;
}

static bool over(Mbarrier& barrier, u32 parity) {
  if (parity > 1) fail("a wait for parity %u of an mbarrier", parity);
  u64& mine = barrier.seen[current->thread];
  if ((barrier.phase & 1) != parity) {
    mine = barrier.phase;
    return true;
  }
  // Lanes of a warp ask together. Where one of them got its answer, the others did too, though they come to it here when that phase is
  // long over and the next one as well.
  for (u32 lane = 0, first = current->thread / 32 * 32; lane < 32; ++lane)
    if (barrier.seen[first + lane] > mine && barrier.seen[first + lane] <= mine + 2) {
      mine += (mine & 1) != parity ? 2 : 1;
      return true;
    }
  return false;
}

void mbarrier_wait(u32 address, u32 parity) {
  for (;;) {
    Mbarrier& barrier = mbarrier_at(*current->block, address, "mbarrier.try_wait", false);
    if (over(barrier, parity)) break;
    wait_in(barrier.waiters, Waits::mbarrier, address, parity);
  }
  acquire();
}

bool mbarrier_test(u32 address, u32 parity) {
  const bool done = over(mbarrier_at(*current->block, address, "mbarrier.test_wait", false), parity);
  if (done) {
    current->polls = 0;
    acquire();
  } else if (++current->polls > 1) {
    poll();  // not at the first question: all lanes of a warp that ask once get the same answer
  }
  return done;
}

}  // namespace emu
