// The tensor cores: mma.sync at once, wgmma beside the threads.
#include "runtime.hpp"

namespace emu {

// ---- numbers ----

float half_to_float(u16 bits) { return static_cast<float>(bits_as<_Float16>(bits)); }
u16 float_to_half(float x) { return bits_as<u16>(static_cast<_Float16>(x)); }
static float bfloat_to_float(u16 bits) { return bits_as<float>(static_cast<u32>(bits) << 16); }
u16 float_to_bfloat(float x) {
  const u32 bits = bits_as<u32>(x);
  if (x != x) return 0x7fff;
  return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static float number(u16 bits, bool half) { return half ? half_to_float(bits) : bfloat_to_float(bits); }

// ---- one warp ----

// D(16x8) += A(16xK) B(Kx8), from and to the registers of the lanes.
template <int kDepth, class Number>
static void multiply(void* const* items, Number&& number) {
  float a[16][kDepth], b[kDepth][8];
  constexpr int kPer = kDepth / 8;  // values in a register
  for (int lane = 0; lane < 32; ++lane) {
    const MmaItem& item = *static_cast<const MmaItem*>(items[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < kPer; ++e) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t * kPer + e + i / 2 * (kDepth / 2)] = number(item.a[i], e);
      for (int i = 0; i < 2; ++i) b[t * kPer + e + i * (kDepth / 2)][g] = number(item.b[i], e);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<const MmaItem*>(items[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      d[i] += sum;
    }
  }
}

void mma_16bit(MmaItem& item, bool half) {
  together("mma.sync.m16n8k16", kAllLanes, &item, half ? [](void* const* items, u32) {
    multiply<16>(items, [](u32 x, int e) { return half_to_float(static_cast<u16>(x >> 16 * e)); });
  } : [](void* const* items, u32) {
    multiply<16>(items, [](u32 x, int e) { return bfloat_to_float(static_cast<u16>(x >> 16 * e)); });
  }, half);
}

void mma_tf32(MmaItem& item) {
  together("mma.sync.m16n8k8", kAllLanes, &item, [](void* const* items, u32) {
    multiply<8>(items, [](u32 x, int) { return bits_as<float>(x & ~0x1fffu); });  // the lowest bits are not looked at
  });
}

// ---- warpgroups ----

static bool same(const Product& x, const Product& y) {
  return x.shape.n == y.shape.n && x.shape.half == y.shape.half && x.shape.transposed_a == y.shape.transposed_a &&
         x.shape.transposed_b == y.shape.transposed_b &&
         x.shape.registers == y.shape.registers && x.a == y.a && x.b == y.b && x.accumulate == y.accumulate;
}

static Warpgroup& group_of(Fiber& fiber) {
  if ((fiber.thread / 128 + 1) * 128 > run->threads)
    fail("wgmma in threads %u to %u, which are no whole warpgroup", fiber.thread / 128 * 128, run->threads);
  return fiber.block->groups[fiber.thread / 128];
}

static void run_until(Block& block, u32 index, u64 number) {
  Warpgroup& group = block.groups[index];
  while (group.done < number) {
    execute(block, index, group.queue.front());
    group.queue.pop_front();
    ++group.done;
  }
}

void product(const ProductShape& shape, float* d, const u32* registers, u64 a, u64 b, bool accumulate) {
  Fiber& me = *current;
  Warpgroup& group = group_of(me);
  if (me.registers_touched) fail("wgmma without wgmma.fence since its registers were last in other use");
  const u64 place = me.products++ - group.done;
  Product mine{shape, a, b, accumulate, 0, {}, {}};
  if (place == group.queue.size()) group.queue.push_back(mine);
  Product& product = group.queue[place];
  if (!same(product, mine))
    fail("the threads of a warpgroup issue different products: n %u, a %llx, b %llx, accumulate %d here, "
         "n %u, a %llx, b %llx, accumulate %d before", shape.n, a, b, accumulate,
         product.shape.n, product.a, product.b, product.accumulate);
  product.d[me.thread % 128] = d, product.registers[me.thread % 128] = registers;
  if (++product.issued < 128) return;
  wake(group.waiters);
  if (run->policy.products == When::now) run_until(*me.block, me.thread / 128, me.products);
}

void product_fence() {
  together("wgmma.fence", kAllLanes, nullptr, [](void* const*, u32) {});
  current->registers_touched = false;
}

void product_commit() {
  together("wgmma.commit_group", kAllLanes, nullptr, [](void* const*, u32) {});
  current->commits.push_back(current->products);
}

void product_wait(u32 pending) {
  together("wgmma.wait_group", kAllLanes, nullptr, [](void* const*, u32) {});
  Fiber& me = *current;
  Warpgroup& group = group_of(me);
  const size_t commits = me.commits.size();
  const u64 needed = commits > pending ? me.commits[commits - 1 - pending] : 0;
  while (group.done < needed && group.queue[needed - 1 - group.done].issued < 128) wait_in(group.waiters, Waits::products);
  if (group.done < needed && run->policy.products == When::last) wait_for_last();
  run_until(*me.block, me.thread / 128, needed);
  if (commits > pending) me.commits.erase(me.commits.begin(), me.commits.end() - static_cast<std::ptrdiff_t>(pending));
  me.registers_touched = true;
}

bool step_products(Block& block) {
  const u32 groups = static_cast<u32>(block.groups.size()), first = static_cast<u32>(draw() % groups);
  for (u32 i = 0; i < groups; ++i) {
    const u32 index = (first + i) % groups;
    const Warpgroup& group = block.groups[index];
    if (group.queue.empty() || group.queue.front().issued < 128) continue;
    run_until(block, index, group.done + 1);
    return true;
  }
  return false;
}

// An operand in shared memory, as its descriptor says.
struct Operand {
  Block& block;
  u32 start, leading, stride;
  bool half;

  Operand(Block& block, u64 descriptor, bool half)
      : block(block), start(static_cast<u32>(descriptor & 0x3fff) << 4), leading(static_cast<u32>(descriptor >> 16 & 0x3fff) << 4),
        stride(static_cast<u32>(descriptor >> 32 & 0x3fff) << 4), half(half) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
      fail("wgmma descriptor %llx: only the 128-byte swizzle without an offset is emulated", descriptor);
  }
  // Eight values from 16 bytes, which the swizzle has moved.
  void read(u32 address, float* values, u32 step) const {
    address ^= address >> 3 & 0x70;
    const u8* memory = shared(block, address, 16, 16, "wgmma");
    check_fenced(block, address, 16, "wgmma");
    u16 bits[8];
    std::memcpy(bits, memory, 16);
    for (u32 i = 0; i < 8; ++i) values[i * step] = number(bits[i], half);
  }
};

void execute(Block& block, u32 group, const Product& product) {
  if (current == nullptr) beside = "wgmma of its warpgroup", beside_fiber = &block.fibers[group * 128];
  const u32 n = product.shape.n;
  const bool half = product.shape.half;
  static float a[64][16], b[16][256], d[64][256];
  if (product.shape.registers) {
    for (u32 thread = 0; thread < 128; ++thread) {
      const u32 row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
      for (u32 i = 0; i < 4; ++i)
        for (u32 e = 0; e < 2; ++e)
          a[row + i % 2 * 8][t * 2 + e + i / 2 * 8] = number(static_cast<u16>(product.registers[thread][i] >> 16 * e), half);
    }
  } else {
    const Operand operand(block, product.a, half);
    for (u32 k = 0; product.shape.transposed_a && k < 16; ++k)
      for (u32 row = 0; row < 64; row += 8) operand.read(operand.start + k / 8 * operand.stride + k % 8 * 128 + row * 2, &a[row][k], 16);
    for (u32 row = 0; !product.shape.transposed_a && row < 64; ++row)
      for (u32 k = 0; k < 16; k += 8) operand.read(operand.start + row / 8 * operand.stride + row % 8 * 128 + k * 2, &a[row][k], 1);
  }
  const Operand operand(block, product.b, half);
  if (product.shape.transposed_b) {
    for (u32 k = 0; k < 16; ++k)
      for (u32 column = 0; column < n; column += 8)
        operand.read(operand.start + column / 64 * operand.leading + k / 8 * operand.stride + k % 8 * 128 + column % 64 * 2, &b[k][column], 1);
  } else {
    for (u32 column = 0; column < n; ++column)
      for (u32 k = 0; k < 16; k += 8) operand.read(operand.start + column / 8 * operand.stride + column % 8 * 128 + k * 2, &b[k][column], 256);
  }
  const auto for_each_pair = [&](auto&& f) {
    for (u32 thread = 0; thread < 128; ++thread)
      for (u32 j = 0; j < n / 8; ++j)
        for (u32 i = 0; i < 4; i += 2) f(product.d[thread] + j * 4 + i, &d[thread / 32 * 16 + thread % 32 / 4 + i / 2 * 8][j * 8 + thread % 4 * 2]);
  };
  if (product.accumulate) for_each_pair([](const float* registers, float* tile) { tile[0] = registers[0], tile[1] = registers[1]; });
  for (u32 row = 0; row < 64; ++row) {
    float* sum = d[row];
    if (!product.accumulate) std::memset(sum, 0, n * sizeof(float));
    for (u32 k = 0; k < 16; k += 4) {
      const float x = a[row][k], y = a[row][k + 1], z = a[row][k + 2], w = a[row][k + 3];
      for (u32 column = 0; column < n; ++column)
        sum[column] += x * b[k][column] + y * b[k + 1][column] + (z * b[k + 2][column] + w * b[k + 3][column]);
    }
  }
  for_each_pair([](float* registers, const float* tile) { registers[0] = tile[0], registers[1] = tile[1]; });
  if (current == nullptr) beside = nullptr, beside_fiber = nullptr;
}

}  // namespace emu

namespace fm {
extern unsigned char smem[];
}
unsigned emu::shared_address(const void* pointer) {
  const u64 offset = static_cast<u64>(static_cast<const u8*>(pointer) - fm::smem);
  if (offset > run->shared_bytes) fail("the address of %p in shared memory, where it does not lie", pointer);
  return kBase + static_cast<u32>(offset);
}
