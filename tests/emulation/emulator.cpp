// Runs a grid: fibers, the order in which they go on, and the errors that end it.
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <map>

#include "runtime.hpp"

extern "C" void fm_thread(const void* params);  // entry.cpp: the kernel, for one thread

namespace fm {
alignas(4096) unsigned char smem[emu::kWindow];
}

namespace emu {

Dim thread_index, block_index, block_size, grid_size;
Run* run;
Fiber* current;
const char* beside;
Fiber* beside_fiber;

namespace {

constexpr size_t kPage = 4096, kStack = 256 * 1024;  // of a fiber; the lowest page is out of bounds
sigjmp_buf failed;
char* report;
size_t report_bytes;
void* scheduler_stack_pointer;
u8* stacks;
size_t stack_count;
int memory_file = -1;
u8* memories;  // shared memory of all blocks that are alive, each followed by a page out of bounds
size_t memory_stride;
Block* window;  // whose shared memory fm::smem shows
volatile u64 last_switches;
volatile sig_atomic_t expired;  // the time is over
pthread_t runner;

// ---- fibers ----

extern "C" void emu_switch(void** from, void* to);
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");

void fiber_main() {
  fm_thread(run->params);
  thread_exits();
  __builtin_trap();
}

void begin(Fiber& fiber, size_t stack) {
  u64* top = reinterpret_cast<u64*>(stacks + (stack + 1) * kStack) - 1;
  *top = 0;  // fiber_main has no caller
  *--top = reinterpret_cast<u64>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber.stack_pointer = top;
}

void show(Block& block) {
  if (window == &block) return;
  window = &block;
  const size_t bytes = (run->shared_bytes + kPage - 1) / kPage * kPage;
  if (bytes != 0 && mmap(fm::smem, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory_file, static_cast<off_t>(block.slot * memory_stride)) == MAP_FAILED)
    fail("mmap of shared memory");
}

void run_fiber(Fiber& fiber) {
  show(*fiber.block);
  thread_index = {fiber.thread, 0, 0}, block_index = {fiber.block->index, 0, 0};
  current = &fiber;
  ++run->switches;
  emu_switch(&scheduler_stack_pointer, fiber.stack_pointer);
  current = nullptr;
}

void leave() { emu_switch(&current->stack_pointer, scheduler_stack_pointer); }

// ---- blocks ----

void start(Cluster& cluster, u32 index) {
  for (u32 rank = 0; rank < run->cluster; ++rank) {
    Block* block = run->free_blocks.back();
    run->free_blocks.pop_back();
    const u32 slot = block->slot;
    u8* memory = block->memory;
    *block = Block();
    block->slot = slot, block->memory = memory, block->cluster = &cluster;
    block->index = index * run->cluster + rank, block->rank = rank, block->alive = run->threads;
    block->fibers.resize(run->threads), block->warps.resize(run->threads / 32), block->groups.resize((run->threads + 127) / 128);
    block->written.resize((run->shared_bytes + 15) / 16);
    // What an earlier block left: NaNs of every type, or noise. Behind the end lies a pattern that must stay.
    for (u32 i = 0; i < memory_stride - kPage; i += 8) {
      const u64 noise = run->noise ? draw() : ~0ull;
      std::memcpy(memory + i, &noise, 8);
    }
    std::memset(memory + run->shared_bytes, 0xa5, memory_stride - kPage - run->shared_bytes);
    for (u32 i = 0; i < run->threads; ++i) {
      Fiber& fiber = block->fibers[i];
      fiber.block = block, fiber.warp = &block->warps[i / 32], fiber.thread = i, fiber.lane = i % 32;
      begin(fiber, slot * run->threads + i);
    }
    for (u32 i = 0; i < run->threads / 32; ++i) {
      block->warps[i].block = block, block->warps[i].index = i, block->warps[i].priority = static_cast<u32>(draw());
      make_ready(block->warps[i], kAllLanes);
    }
    cluster.blocks.push_back(block);
  }
  cluster.alive = run->cluster * run->threads;
  run->live.push_back(&cluster);
}

void end(Block& block) {
  for (const Load& load : run->loads)
    if (load.block == &block) fail("block %u ends while a bulk copy of thread %u into its shared memory +0x%x is under way", block.index, load.fiber->thread, load.target - kBase);
  for (const Store* store : run->stores)
    if (store->block == &block && !store->read)
      fail("block %u ends before a bulk store of thread %u has read its shared memory +0x%x", block.index, store->fiber->thread, store->source - kBase);
  for (const Arrival& arrival : run->arrivals)
    if (arrival.fiber->block == &block) fail("block %u ends before the cp.async arrival of thread %u", block.index, arrival.fiber->thread);
  for (u32 i = run->shared_bytes; i < memory_stride - kPage; ++i)
    if (block.memory[i] != 0xa5) fail("block %u wrote %u bytes behind the end of its %u bytes of shared memory", block.index, i - run->shared_bytes, run->shared_bytes);
}

void reap() {
  for (size_t i = 0; i < run->live.size(); ++i) {
    Cluster* cluster = run->live[i];
    if (cluster->alive != 0) continue;
    for (Block* block : cluster->blocks) end(*block), run->free_blocks.push_back(block);
    run->live.erase(run->live.begin() + static_cast<std::ptrdiff_t>(i--));
    delete cluster;
  }
}

// ---- who goes on ----

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
  while (warp.ready != 0 && !warp.paused) {
    const int lane = downwards ? 31 - __builtin_clz(warp.ready) : __builtin_ctz(warp.ready);
    warp.ready &= ~(1u << lane);
    run_fiber(warp.block->fibers[warp.index * 32 + static_cast<u32>(lane)]);
  }
  warp.listed = false;
  if (warp.ready != 0) make_ready(warp, 0);
}

[[noreturn]] void deadlock(const char* what) {
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

void loop() {
  for (;;) {
    while (run->live.size() < run->resident && run->next_cluster < run->clusters) start(*new Cluster, run->order[run->next_cluster++]);
    if (expired) deadlock("out of time");
    if (chance(run->policy.step)) step(true);
    Warp* warp = pick();
    if (warp != nullptr && run->idle_polls > 64 + 4 * run->threads * run->cluster * run->resident) {
      make_ready(*warp, 0);
      run->idle_polls = 0;
      if (!nothing_is_ready()) deadlock("nothing changes: the threads that do not wait only ask whether something has happened");
      continue;
    }
    if (warp != nullptr) {
      run_warp(*warp);
    } else if (run->live.empty()) {
      break;
    } else if (!nothing_is_ready()) {
      deadlock("deadlock: every thread waits");
    }
    reap();
  }
  for (Store* store : run->stores) {
    write_store(*store);
    delete store;
  }
}

// ---- faults ----

struct sigaction before[NSIG];
constexpr int kFaults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};

void on_signal(int number, siginfo_t* info, void* context) {
  if (run == nullptr || !pthread_equal(pthread_self(), runner)) {
    if (number == SIGVTALRM && run != nullptr) pthread_kill(runner, SIGVTALRM);
    else sigaction(number, &before[number], nullptr);  // it happens again, to whoever it belongs to
    return;
  }
  if (number == SIGVTALRM) {
    if (last_switches != run->switches) {  // fibers still switch: loop() is not left in the middle of what it does
      last_switches = run->switches;
      expired = 1;
      return;
    }
    fail("out of time, in a thread that neither waits nor ends");
  }
  const u8* address = static_cast<const u8*>(info->si_addr);
  if (number == SIGFPE) fail("an integer is divided by zero");
  if (number == SIGILL || number == SIGTRAP) fail("a misaligned access, or an index beyond a local array");
  if (address >= stacks && address < stacks + stack_count * kStack) fail("a local array is too large for the stack, or written beyond its end");
  if (address >= fm::smem && address < fm::smem + kWindow) fail("an access to shared memory +0x%lx, behind its end", static_cast<unsigned long>(address - fm::smem));
  const bool writes = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & 2;
  if (address == nullptr) fail("an access to address 0, or a misaligned one");
  fail("%s address 0x%llx, where there is no memory for it", writes ? "a write to" : "a read from", reinterpret_cast<u64>(address));
}

}  // namespace

u64 draw() {
  u64 z = run->random += 0x9e3779b97f4a7c15ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}

void fail(const char* format, ...) {
  int used = 0;
  if (const Fiber* fiber = current != nullptr ? current : beside_fiber)
    used = snprintf(report, report_bytes, "block %u, thread %u (warp %u, lane %u)%s%s: ", fiber->block->index, fiber->thread, fiber->thread / 32, fiber->lane,
                    beside != nullptr ? ", " : "", beside != nullptr ? beside : "");
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(report + used, report_bytes - static_cast<size_t>(used), format, arguments);
  va_end(arguments);
  siglongjmp(failed, 1);
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

// Lanes that could go on go on first: on a GPU a warp would run them with this one, or has run them before.
void may_pause() {
  if (current->warp->ready == 0 && chance(run->policy.pause)) pause();
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
      snprintf(text, sizeof text, "mbarrier at shared +0x%x, parity %llu: its phase %llu lacks %d of %u arrivals and %lld bytes", address - kBase, fiber.detail[1],
               one.phase, one.pending, one.expected, one.bytes);
      break;
    }
    case Waits::named:
      snprintf(text, sizeof text, "barrier %u, where %u of %u threads have arrived", address, block.named[address].arrived, block.named[address].expected);
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

static Policy policy_of(u64 seed) {
  constexpr When now = When::now, last = When::last;
  if (seed == 0) return {now, now, now, now, 0, 0, false, false};
  if (seed == 1) return {last, last, last, last, 0, 0, false, true};
  if (seed == 2) return {now, last, last, last, 0x1000, 0, false, true};
  if (seed == 3) return {last, now, now, now, 0x1000, 0, true, true};
  const auto any = [] { return static_cast<When>(draw() % 3); };
  const u32 pauses[] = {0, 0x400, 0x2000}, steps[] = {0x8000, 0x1000, 0x200};
  return {any(), any(), any(), any(), pauses[draw() % 3], steps[draw() % 3], draw() % 2 == 0, true};
}

// Maps what the run needs: stacks that are kept for the next one, and shared memory.
static void prepare(size_t fibers, size_t blocks) {
  if (fibers > stack_count) {
    if (stacks != nullptr) munmap(stacks, stack_count * kStack);
    stack_count = 0;
    stacks = static_cast<u8*>(mmap(nullptr, fibers * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED) stacks = nullptr, fail("mmap of %zu stacks", fibers);
    stack_count = fibers;
    for (size_t i = 0; i < fibers; ++i) mprotect(stacks + i * kStack, kPage, PROT_NONE);
  }
  memory_stride = (run->shared_bytes + kPage - 1) / kPage * kPage + kPage;
  memory_file = memfd_create("shared", 0);
  if (memory_file < 0 || ftruncate(memory_file, static_cast<off_t>(blocks * memory_stride)) != 0) fail("memfd_create");
  memories = static_cast<u8*>(mmap(nullptr, blocks * memory_stride, PROT_READ | PROT_WRITE, MAP_SHARED, memory_file, 0));
  if (memories == MAP_FAILED) memories = nullptr, fail("mmap of shared memory");
  mmap(fm::smem, kWindow, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  window = nullptr;
  for (size_t i = blocks; i-- > 0;) {
    Block* block = new Block;
    block->slot = static_cast<u32>(i), block->memory = memories + i * memory_stride;
    run->free_blocks.push_back(block);
  }
}

}  // namespace emu

// Runs a grid of blocks along x. 0: done; 1: `text` says what went wrong (what the run had allocated is then not given back).
extern "C" __attribute__((visibility("default"))) int fm_run(const void* params, unsigned grid, unsigned threads, unsigned shared_bytes, unsigned cluster,
                                                             unsigned resident, unsigned long long seed, double limit_s, char* text, size_t text_bytes) {
  using namespace emu;
  static u8 signal_stack[64 * 1024];
  report = text, report_bytes = text_bytes;
  run = new Run();
  run->params = params, run->threads = threads, run->shared_bytes = shared_bytes, run->cluster = cluster, run->clusters = grid / cluster;
  run->resident = resident, run->random = seed;
  run->policy = policy_of(seed);
  run->noise = seed % 2 == 1;
  block_size = {threads, 1, 1}, grid_size = {grid, 1, 1};
  current = beside_fiber = nullptr, beside = nullptr;
  runner = pthread_self();
  last_switches = ~0ull;
  expired = 0;

  stack_t old_stack, new_stack = {};
  new_stack.ss_sp = signal_stack, new_stack.ss_size = sizeof signal_stack;
  sigaltstack(&new_stack, &old_stack);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (const int number : kFaults) sigaction(number, &action, &before[number]);
  action.sa_flags |= SA_RESTART;
  sigaction(SIGVTALRM, &action, &before[SIGVTALRM]);
  const double seconds = limit_s < 0.1 ? 0.1 : limit_s;
  const auto whole = static_cast<time_t>(seconds);
  const itimerval timer = {{1, 0}, {whole, static_cast<suseconds_t>((seconds - static_cast<double>(whole)) * 1e6)}}, off = {};
  itimerval old_timer;
  setitimer(ITIMER_VIRTUAL, &timer, &old_timer);

  int code = 1;
  if (sigsetjmp(failed, 1) == 0) {
    prepare(static_cast<size_t>(threads) * cluster * resident, static_cast<size_t>(cluster) * resident);
    for (u32 i = 0; i < run->clusters; ++i) run->order.push_back(i);
    if (run->policy.shuffled)
      for (u32 i = run->clusters; i > 1; --i) std::swap(run->order[i - 1], run->order[draw() % i]);
    loop();
    for (Block* block : run->free_blocks) delete block;
    delete run;
    code = 0;
  }
  setitimer(ITIMER_VIRTUAL, &off, nullptr);
  sigaction(SIGVTALRM, &before[SIGVTALRM], nullptr);
  setitimer(ITIMER_VIRTUAL, &old_timer, nullptr);
  for (const int number : kFaults) sigaction(number, &before[number], nullptr);
  sigaltstack(&old_stack, nullptr);
  run = nullptr, current = nullptr;
  mmap(fm::smem, kWindow, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  if (memories != nullptr) munmap(memories, static_cast<size_t>(cluster) * resident * memory_stride);
  memories = nullptr;
  close(memory_file);
  return code;
}
