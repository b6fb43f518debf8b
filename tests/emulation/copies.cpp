// Shared memory, and what the copy engine and cp.async do with it beside the threads.
#include "runtime.hpp"

namespace emu {

namespace {

// Names whose work the scheduler does, for reports.
struct Beside {
  Beside(const char* what, Fiber* fiber) {
    if (current == nullptr) beside = what, beside_fiber = fiber;
  }
  ~Beside() {
    if (current == nullptr) beside = nullptr, beside_fiber = nullptr;
  }
};

}  // namespace

// ---- shared memory ----

u32 shared_address(const void* pointer);

Block& block_of(u32 address, bool from_cluster) {
  const u32 rank_1 = address >> kRankShift;
  Block& mine = *current->block;
  if (rank_1 == 0) {
    if (from_cluster) return mine;  // an address of this block is one of the cluster as well
    return mine;
  }
  if (!from_cluster) fail("%08x is an address of a cluster, where one of the block is needed", address);
  Block& block = *mine.cluster->blocks.at(rank_1 - 1);
  if (block.alive == 0) fail("the shared memory of block %u is accessed after its end", block.index);
  return block;
}

u8* shared(Block& block, u32 address, u32 bytes, u32 align, const char* what) {
  if (address < kBase || address + bytes > kBase + run->shared_bytes)
    fail("%s: %u bytes at shared +0x%x, of 0x%x", what, bytes, address - kBase, run->shared_bytes);
  if (address % align != 0) fail("%s: shared +0x%x is no multiple of %u", what, address - kBase, align);
  return block.memory + (address - kBase);
}

void* shared_read(u32 address, u32 bytes) { return shared(*current->block, address, bytes, bytes, "a load"); }

void* shared_write(u32 address, u32 bytes) {
  u8* memory = shared(*current->block, address, bytes, bytes, "a store");
  note_written(*current->block, current->thread, address, bytes);
  return memory;
}

void note_written(Block& block, u32 thread, u32 address, u32 bytes) {
  for (u32 i = (address - kBase) / 16; i <= (address - kBase + bytes - 1) / 16; ++i) {
    if (block.written[i].thread_plus_1 == 0) block.unfenced.push_back(i);
    block.written[i] = {thread + 1, ++run->clock};
  }
}

void forget_written(Block& block, u32 address, u32 bytes) {
  for (u32 i = (address - kBase) / 16; i <= (address - kBase + bytes - 1) / 16; ++i) block.written[i].thread_plus_1 = 0;
}

void check_fenced(Block& block, u32 address, u32 bytes, const char* what) {
  for (u32 i = (address - kBase) / 16; i <= (address - kBase + bytes - 1) / 16; ++i)
    if (const u32 writer = block.written[i].thread_plus_1)
      fail("%s reads shared +0x%x, which thread %u wrote without a fence.proxy.async after it", what, i * 16, writer - 1);
}

// What this thread wrote, and what others wrote before it last waited for somebody, is seen by the copy engine and the tensor cores.
void fence_proxy_async() {
  Block& block = *current->block;
  size_t kept = 0;
  for (const u32 i : block.unfenced) {
    Written& one = block.written[i];
    if (one.thread_plus_1 == current->thread + 1 || one.when < current->acquired) one.thread_plus_1 = 0;
    if (one.thread_plus_1 != 0) block.unfenced[kept++] = i;
  }
  block.unfenced.resize(kept);
  for (auto& [address, barrier] : block.mbarriers)
    if (barrier.thread == current->thread) barrier.fenced = true;
}

// ---- cp.async ----

static void run_copy(Fiber& fiber, Copy& copy) {
  if (copy.done) return;
  copy.done = true;
  const Beside note("cp.async", &fiber);
  u8* target = shared(*fiber.block, copy.target, 16, 16, "cp.async");
  if (copy.valid) std::memcpy(target, copy.source, 16);
  else std::memset(target, 0, 16);
  note_written(*fiber.block, fiber.thread, copy.target, 16);
}

void run_copies(Fiber& fiber, u64 before) {
  for (Copy& copy : fiber.copies)
    if (fiber.first_copy + static_cast<u64>(&copy - fiber.copies.data()) < before) run_copy(fiber, copy);
}

void copy_begin(u32 target, const void* source, bool valid) {
  if (valid && reinterpret_cast<u64>(source) % 16 != 0) fail("cp.async reads from %p, which is no multiple of 16", source);
  Copy copy{target, source, valid, false, current->copy_group};
  shared(*current->block, target, 16, 16, "cp.async");
  const When when = run->policy.copies;
  if (when == When::now || (when == When::later && (draw() & 1))) run_copy(*current, copy);
  current->copies.push_back(copy);
}

void copy_commit() { ++current->copy_group; }

void copy_wait(u32 pending) {
  Fiber& me = *current;
  u64 count = 0;  // copies of groups that are waited for
  bool waits = false;
  while (count < me.copies.size() && me.copies[count].group + pending < me.copy_group) waits |= !me.copies[count++].done;
  if (waits && run->policy.copies == When::last) wait_for_last();
  run_copies(me, me.first_copy + count);
  me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<std::ptrdiff_t>(count));
  me.first_copy += count;
}

void copy_arrive(u32 barrier) {
  mbarrier_at(*current->block, barrier, "cp.async.mbarrier.arrive", false);
  const Arrival arrival{current, current->first_copy + current->copies.size(), barrier};
  if (run->policy.copies == When::now) run_arrival(arrival);
  else run->arrivals.push_back(arrival);
  may_pause();
}

void run_arrival(const Arrival& arrival) {
  const Beside note("cp.async.mbarrier.arrive", arrival.fiber);
  Block& block = *arrival.fiber->block;
  run_copies(*arrival.fiber, arrival.after);
  arrive_at(mbarrier_at(block, arrival.barrier, "cp.async.mbarrier.arrive", false), block);
}

// ---- the copy engine ----

static const Map& map_at(const void* pointer, u32 rank) {
  const Map& map = *static_cast<const Map*>(pointer);
  if (reinterpret_cast<u64>(pointer) % 64 != 0) fail("a tensor map at an address that is no multiple of 64");
  if (map.magic != kMapMagic || map.address % 16 != 0) fail("these 128 bytes are no tensor map");
  if (rank != 0 && map.rank != rank) fail("a copy of %u dimensions with a tensor map of %u", rank, map.rank);
  return map;
}

// The copy engine reads and writes from multiples of 16 bytes on; another place is an illegal instruction to it.
static void check_place(const Map& map, const int* at) {
  if (static_cast<i64>(at[0]) * map.element % 16 != 0) fail("a bulk copy from element %d of rows of %u-byte elements: no multiple of 16 bytes", at[0], map.element);
}

void tma_check(const void* map, u32 rank) { map_at(map, rank); }

static u32 box_bytes(const Map& map) {
  u32 bytes = map.element;
  for (u32 i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

// Calls f(offset of the row in the box, address of its first element or 0 where the row lies outside, elements to skip, elements that exist).
template <class F>
static void for_each_row(const Map& map, const int* at, F&& f) {
  const i64 width = map.box[0], first = at[0] < 0 ? -static_cast<i64>(at[0]) : 0;
  i64 last = static_cast<i64>(map.dims[0]) - at[0];
  last = last > width ? width : last < first ? first : last;
  u32 rows = 1;
  for (u32 i = 1; i < map.rank; ++i) rows *= map.box[i];
  for (u32 row = 0; row < rows; ++row) {
    u64 address = map.address + static_cast<u64>(static_cast<i64>(at[0]) * map.element);
    bool inside = first < last && first < width;
    for (u32 i = 1, rest = row; i < map.rank; ++i) {
      const i64 c = static_cast<i64>(at[i]) + rest % map.box[i];
      rest /= map.box[i];
      inside &= c >= 0 && c < static_cast<i64>(map.dims[i]);
      address += static_cast<u64>(c) * map.strides[i - 1];
    }
    f(row * static_cast<u32>(width) * map.element, inside ? address : 0, static_cast<u32>(first), static_cast<u32>(last));
  }
}

// Where byte `offset` of a box lies that begins at `address`.
static u32 swizzled(const Map& map, u32 address, u32 offset) {
  const u32 plain = address + offset, mask = map.swizzle == 128 ? 7 : map.swizzle == 64 ? 3 : map.swizzle == 32 ? 1 : 0;
  return plain ^ (plain >> 7 & mask) << 4;
}

void tma_load(u32 target, const void* pointer, u32 barrier, u32 blocks, u32 rank, const int* at) {
  const Map& map = map_at(pointer, rank);
  check_place(map, at);
  Block& mine = *current->block;
  if (blocks == 0) blocks = 1u << mine.rank;
  if (blocks >> run->cluster) fail("a multicast to blocks %x of a cluster of %u", blocks, run->cluster);
  if (target >> kRankShift || barrier >> kRankShift) fail("a bulk copy to an address of another block");
  for (u32 i = 0; i < run->cluster; ++i) {
    if (!(blocks >> i & 1)) continue;
    Block& block = *mine.cluster->blocks[i];
    if (block.alive == 0) fail("a bulk copy to block %u after its end", block.index);
    shared(block, target, box_bytes(map), 128, "a bulk copy");
    mbarrier_at(block, barrier, "a bulk copy", true);
    Load load{&block, current, target, barrier, map, {}};
    for (u32 j = 0; j < rank; ++j) load.at[j] = at[j];
    if (run->policy.loads == When::now) run_load(load);
    else run->loads.push_back(load);
  }
  may_pause();
}

void copy_in_cluster(u32 target, u32 source, u32 bytes, u32 barrier) {
  Block &block = block_of(target, true), &other = block_of(barrier, true);
  if (&block != &other) fail("a bulk copy to one block that reports to another");
  constexpr u32 kPlace = (1u << kRankShift) - 1;
  if (bytes % 16 != 0) fail("a bulk copy of %u bytes", bytes);
  shared(block, target & kPlace, bytes, 16, "a bulk copy");
  shared(*current->block, source, bytes, 16, "a bulk copy");
  mbarrier_at(block, barrier, "a bulk copy", true);
  const Load load{&block, current, target & kPlace, barrier & kPlace, {}, {}, current->block, source, bytes};
  if (run->policy.loads == When::now) run_load(load);
  else run->loads.push_back(load);
  may_pause();
}

static void run_copy_in_cluster(const Load& load) {
  const Beside note("a bulk copy between blocks", load.fiber);
  check_fenced(*load.from, load.source, load.bytes, "a bulk copy");
  forget_written(*load.block, load.target, load.bytes);
  std::memcpy(shared(*load.block, load.target, load.bytes, 16, "a bulk copy"), shared(*load.from, load.source, load.bytes, 16, "a bulk copy"), load.bytes);
  complete_bytes(mbarrier_at(*load.block, load.barrier, "a bulk copy", true), *load.block, load.bytes);
}

void run_load(const Load& load) {
  if (load.from != nullptr) return run_copy_in_cluster(load);
  const Beside note("a bulk copy to shared memory", load.fiber);
  const Map& map = load.map;
  const u32 bytes = box_bytes(map), width = map.box[0] * map.element;
  u8* memory = shared(*load.block, load.target, bytes, 128, "a bulk copy") - load.target;
  forget_written(*load.block, load.target, bytes);
  for_each_row(map, load.at, [&](u32 offset, u64 address, u32 first, u32 last) {
    alignas(16) u8 row[4096] = {};
    const u32 begin = first * map.element, end = last * map.element;
    if (address != 0) std::memcpy(row + begin, reinterpret_cast<const u8*>(address) + begin, end - begin);
    for (u32 i = 0; i < width; i += 16) std::memcpy(memory + swizzled(map, load.target, offset + i), row + i, 16);
  });
  complete_bytes(mbarrier_at(*load.block, load.barrier, "a bulk copy", true), *load.block, bytes);
}

void tma_store(const void* pointer, u32 source, u32 rank, const int* at) {
  const Map& map = map_at(pointer, rank);
  check_place(map, at);
  shared(*current->block, source, box_bytes(map), 128, "a bulk store");
  Store* store = new Store{current->block, current, source, current->store_group, map, {}, false, {}};
  for (u32 j = 0; j < rank; ++j) store->at[j] = at[j];
  begin_store(store);
}

void bulk_add(float* sums, u32 source, u32 bytes) {
  if (reinterpret_cast<u64>(sums) % 16 != 0 || bytes % 16 != 0) fail("a bulk add of %u bytes to %p", bytes, static_cast<void*>(sums));
  shared(*current->block, source, bytes, 16, "a bulk add");
  begin_store(new Store{current->block, current, source, current->store_group, {}, {}, false, {}, sums, bytes});
}

void begin_store(Store* store) {
  if (run->policy.stores == When::now) {
    read_store(*store);
    write_store(*store);
    delete store;
  } else {
    run->stores.push_back(store);
  }
  may_pause();
}

void read_store(Store& store) {
  const Beside note("a bulk store", store.fiber);
  const u32 bytes = store.sums ? store.size : box_bytes(store.map);
  check_fenced(*store.block, store.source, bytes, "a bulk store");
  const u8* memory = shared(*store.block, store.source, bytes, store.sums ? 16 : 128, "a bulk store") - store.source;
  store.bytes.resize(bytes);
  if (store.sums) std::memcpy(store.bytes.data(), memory + store.source, bytes);
  else for (u32 i = 0; i < bytes; i += 16) std::memcpy(&store.bytes[i], memory + swizzled(store.map, store.source, i), 16);
  store.read = true;
}

void write_store(Store& store) {
  const Beside note("a bulk store", store.fiber);
  if (store.sums) {
    for (u32 i = 0; i < store.size / 4; ++i) store.sums[i] += reinterpret_cast<const float*>(store.bytes.data())[i];
    return;
  }
  for_each_row(store.map, store.at, [&](u32 offset, u64 address, u32 first, u32 last) {
    if (address == 0) return;
    const u32 element = store.map.element;
    std::memcpy(reinterpret_cast<u8*>(address) + first * element, &store.bytes[offset + first * element], (last - first) * element);
  });
}

void store_commit() { ++current->store_group; }

void store_wait(u32 pending, bool read_only) {
  Fiber& me = *current;
  const auto waited_for = [&](const Store& store) {
    return store.fiber == &me && store.group + pending < me.store_group && !(read_only && store.read);
  };
  bool waits = false;
  for (const Store* store : run->stores) waits |= waited_for(*store);
  if (waits && run->policy.stores == When::last) wait_for_last();
  else may_pause();
  for (size_t i = 0; i < run->stores.size(); ++i) {
    Store* store = run->stores[i];
    if (!waited_for(*store)) continue;
    if (!store->read) read_store(*store);
    if (read_only) continue;
    write_store(*store);
    delete store;
    run->stores.erase(run->stores.begin() + static_cast<std::ptrdiff_t>(i--));
  }
}

}  // namespace emu
