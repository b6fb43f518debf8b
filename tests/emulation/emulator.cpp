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
volatile sig_atomic_t expired;

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
  const auto at = static_cast<off_t>(block.slot * memory_stride);
  if (bytes != 0 && mmap(fm::smem, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory_file, at) == MAP_FAILED)
    fail("mmap of shared memory");
}

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
    if (load.block == &block || load.from == &block)
      fail("block %u ends while a bulk copy of thread %u into its shared memory +0x%x is under way", block.index, load.fiber->thread,
           load.target - kBase);
  for (size_t i = 0; i < run->stores.size(); ++i) {
    Store* store = run->stores[i];
    if (store->block != &block) continue;
    if (!store->read)
      fail("block %u ends before a bulk store of thread %u has read its shared memory +0x%x", block.index, store->fiber->thread,
           store->source - kBase);
    write_store(*store);
    delete store;
    run->stores.erase(run->stores.begin() + static_cast<std::ptrdiff_t>(i--));
  }
  for (const Arrival& arrival : run->arrivals)
    if (arrival.fiber->block == &block) fail("block %u ends before the cp.async arrival of thread %u", block.index, arrival.fiber->thread);
  for (u32 i = run->shared_bytes; i < memory_stride - kPage; ++i)
    if (block.memory[i] != 0xa5)
      fail("block %u wrote %u bytes behind the end of its %u bytes of shared memory", block.index, i - run->shared_bytes, run->shared_bytes);
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
  if (address >= fm::smem && address < fm::smem + kWindow)
    fail("an access to shared memory +0x%lx, behind its end", static_cast<unsigned long>(address - fm::smem));
  const bool writes = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & 2;
  if (address == nullptr) fail("an access to address 0, or a misaligned one");
  fail("%s address 0x%llx, where there is no memory for it", writes ? "a write to" : "a read from", reinterpret_cast<u64>(address));
}

}  // namespace

void run_fiber(Fiber& fiber) {
  show(*fiber.block);
  thread_index = {fiber.thread, 0, 0}, block_index = {fiber.block->index, 0, 0};
  current = &fiber;
  ++run->switches;
  emu_switch(&scheduler_stack_pointer, fiber.stack_pointer);
  current = nullptr;
}

void leave() { emu_switch(&current->stack_pointer, scheduler_stack_pointer); }

void fail(const char* format, ...) {
  int used = 0;
  if (const Fiber* fiber = current != nullptr ? current : beside_fiber)
    used = snprintf(report, report_bytes, "block %u, thread %u (warp %u, lane %u)%s%s: ", fiber->block->index, fiber->thread,
                    fiber->thread / 32, fiber->lane, beside != nullptr ? ", " : "", beside != nullptr ? beside : "");
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(report + used, report_bytes - static_cast<size_t>(used), format, arguments);
  va_end(arguments);
  siglongjmp(failed, 1);
}

// Maps what the run needs: stacks with a page behind each that nobody may touch, and shared memory. All of it is given back after the
// run: every kernel is a library of its own, and a process has only so many mappings.
static void prepare(size_t fibers, size_t blocks) {
  stacks = static_cast<u8*>(mmap(nullptr, fibers * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) stacks = nullptr, fail("mmap of %zu stacks", fibers);
  stack_count = fibers;
  for (size_t i = 0; i < fibers; ++i) mprotect(stacks + i * kStack, kPage, PROT_NONE);
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
extern "C" __attribute__((visibility("default"))) int fm_run(const void* params, unsigned grid, unsigned threads, unsigned shared_bytes,
                                                             unsigned cluster, unsigned resident, unsigned long long seed, double limit_s,
                                                             char* text, size_t text_bytes) {
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
  if (stacks != nullptr) munmap(stacks, stack_count * kStack);
  stacks = nullptr, stack_count = 0;
  memories = nullptr;
  close(memory_file);
  return code;
}
