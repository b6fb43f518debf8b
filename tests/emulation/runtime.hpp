// The state of an emulated grid. Every CUDA thread is a fiber; one runs at a time, until it waits, pauses or ends.
#pragma once
#include <signal.h>

#include <cstring>
#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda.hpp"

namespace emu {

constexpr u32 kBase = 1024;           // address of a block's first byte of shared memory: not 0, as on a GPU
constexpr u32 kWindow = 256 * 1024;   // bytes of fm::smem, through which kernels see the shared memory of the running block
constexpr u32 kRankShift = 24;        // addresses of other blocks of a cluster have 1 + rank above this bit

struct Block;
struct Warp;
struct Cluster;
struct Fiber;

// What a fiber waits for, in words for the report.
enum class Waits { nothing, lanes, mbarrier, named, block, cluster, products, last };

// Fibers that wait for the same thing.
struct Waiters {
  Fiber* first = nullptr;
};

struct Copy {
  u32 target;
  const void* source;
  bool valid, done;
  u32 group;
};

struct Fiber {
  void* stack_pointer = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  u32 thread = 0, lane = 0;
  Waits waits = Waits::nothing;
  u64 detail[2] = {};
  Fiber* next_waiter = nullptr;
  u64 acquired = 0;  // when it last saw what others did
  u32 polls = 0;     // questions in a row that were answered with no
  std::vector<Copy> copies;
  u64 first_copy = 0;  // number of copies[0] among all that the thread began
  u32 copy_group = 0, store_group = 0;
  u64 products = 0;               // issued
  std::vector<u64> commits;       // products issued when a group was committed
  bool registers_touched = true;  // since the last wgmma.fence
  u64 cluster_ticket = 0;
};

// Lanes of a warp that come together.
struct Meeting {
  const char* what;
  u64 detail;
  u32 lanes, arrived;
  void* items[32];
};

struct Warp {
  Block* block = nullptr;
  u32 index = 0, ready = 0, lazy = 0, exited = 0, priority = 0;
  bool listed = false, paused = false;
  std::vector<Meeting> meetings;
};

struct Mbarrier {
  u32 address, expected;
  int pending;
  i64 bytes;  // announced and not yet landed
  u64 phase;
  u32 thread;   // that initialised it
  bool fenced;  // the copy engine and other blocks see it
  Waiters waiters;
  std::vector<u64> seen;  // by thread: the phase it last saw
};

struct NamedBarrier {
  u32 arrived = 0, expected = 0;
  u32 waiting = 0, owners = 0;  // warps that wait in this generation; those of every earlier one, 0 before the first
  u64 generation = 0;
  Waiters waiters;
};

struct Product {
  ProductShape shape;
  u64 a, b;
  bool accumulate;
  u32 issued;
  float* d[128];
  const u32* registers[128];
};

struct Warpgroup {
  std::deque<Product> queue;
  u64 done = 0;  // products that took effect; queue[0] is the next one
  Waiters waiters;
};

// Who last wrote 16 bytes of shared memory by ordinary means, if no proxy fence came since.
struct Written {
  u32 thread_plus_1 = 0;
  u64 when = 0;
};

struct Block {
  u32 index = 0, rank = 0, slot = 0, alive = 0;
  Cluster* cluster = nullptr;
  u8* memory = nullptr;  // of its first byte, at address kBase
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Warpgroup> groups;
  std::unordered_map<u32, Mbarrier> mbarriers;
  NamedBarrier named[16], all;
  std::vector<Written> written;
  std::vector<u32> unfenced;  // granules of `written`, some of them fenced by now
};

struct Cluster {
  std::vector<Block*> blocks;
  u32 arrived = 0, alive = 0;
  u64 generation = 0;
  Waiters waiters;
};

// What tests/emulate.py puts into the 128 bytes of a tensor map.
struct Map {
  u64 address;
  u8 rank, element, swizzle, magic;
  u32 dims[5];
  u64 strides[4];
  u16 box[5];
};
constexpr u8 kMapMagic = 0xe7;

struct Load {
  Block* block;
  Fiber* fiber;
  u32 target, barrier;
  Map map;
  int at[5];
  Block* from = nullptr;  // where it comes from shared memory: the block, the place and the size
  u32 source = 0, bytes = 0;
};
struct Store {
  Block* block;
  Fiber* fiber;
  u32 source, group;
  Map map;
  int at[5];
  bool read;
  std::vector<u8> bytes;
  float* sums = nullptr;  // of bulk_add, to which `size` bytes are added
  u32 size = 0;
};
struct Arrival {  // of cp.async.mbarrier.arrive
  Fiber* fiber;
  u64 after;  // copies of the thread
  u32 barrier;
};

// When what runs beside the threads takes effect: when it is asked for, some time later, or only when somebody can wait no longer.
enum class When { now, later, last };
struct Policy {
  When loads, stores, copies, products;
  u32 pause, step;    // in 65536 chances: that a thread pauses where it may; that something asynchronous happens between two warps
  bool priorities;    // one warp runs as far as it can, instead of any
  bool shuffled;      // warps and lanes in random order
  bool ragged;        // one lane may go on where others of its warp could go on too
};

struct Run {
  const void* params;
  u32 threads, shared_bytes, cluster, clusters, resident;
  u64 random;
  Policy policy;
  u32 next_cluster = 0;
  std::vector<u32> order;  // of the clusters
  std::vector<Cluster*> live;
  std::vector<Block*> free_blocks;
  std::vector<Warp*> ready;
  std::vector<Load> loads;
  std::vector<Store*> stores;
  std::vector<Arrival> arrivals;
  u64 clock = 0, switches = 0, idle_polls = 0;
  bool noise = false;  // shared memory begins with noise instead of NaNs
};

extern Run* run;
extern Fiber* current;       // null: the scheduler
extern const char* beside;   // what the scheduler does for somebody, for reports of faults
extern Fiber* beside_fiber;
extern volatile sig_atomic_t expired;  // the time is over

u64 draw();
inline bool chance(u32 of_65536) { return of_65536 != 0 && (draw() & 0xffff) < of_65536; }

// The scheduler's part.
Policy policy_of(u64 seed);
bool step(bool only_later);
bool nothing_is_ready();
Warp* pick();
void run_warp(Warp& warp);
[[noreturn]] void deadlock(const char* what);
void run_fiber(Fiber& fiber);
void leave();  // the fiber, for the scheduler

void wake(Waiters& waiters);
void make_ready(Warp& warp, u32 lanes);
void wait_in(Waiters& waiters, Waits waits, u64 detail0 = 0, u64 detail1 = 0);
void wait_for_last();  // goes on when nobody else can, or by chance
void switch_out();
void may_pause_together();  // where all lanes of the warp stand at the same place
void thread_exits();
std::string describe(const Fiber& fiber);
inline void acquire() { current->acquired = ++run->clock; }

// ---- shared memory ----
Block& block_of(u32 address, bool from_cluster);  // and only there
u8* shared(Block& block, u32 address, u32 bytes, u32 align, const char* what);
void note_written(Block& block, u32 thread, u32 address, u32 bytes);
void check_fenced(Block& block, u32 address, u32 bytes, const char* what);
void forget_written(Block& block, u32 address, u32 bytes);

Mbarrier& mbarrier_at(Block& block, u32 address, const char* what, bool asynchronous);
void arrive_at(Mbarrier& barrier, Block& block);
void complete_bytes(Mbarrier& barrier, Block& block, u32 bytes);
void thread_left_barriers(Block& block);

void run_load(const Load& load);
void begin_store(Store* store);
void read_store(Store& store);
void write_store(Store& store);
void run_copies(Fiber& fiber, u64 before);  // those with smaller numbers
void run_arrival(const Arrival& arrival);
bool step_products(Block& block);  // the next product of some warpgroup; false: there is none that may run
void execute(Block& block, u32 group, const Product& product);

}  // namespace emu
