// CUDA's device functions that the kernels call, in the types they call them with.
#pragma once

extern "C" {
float fmaf(float, float, float) noexcept;
float fabsf(float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float exp2f(float) noexcept;
float expf(float) noexcept;
float log2f(float) noexcept;
float logf(float) noexcept;
float log1pf(float) noexcept;
float expm1f(float) noexcept;
float sqrtf(float) noexcept;
float erff(float) noexcept;
float tanhf(float) noexcept;
float rintf(float) noexcept;
float floorf(float) noexcept;
float ceilf(float) noexcept;
float copysignf(float, float) noexcept;
}

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// CUDA's min and max take mixed integers, by the usual conversions.
#define EMU_MIN_MAX(A, B, R)                                                                                            \
  constexpr R min(A a, B b) { return static_cast<R>(a) < static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); } \
  constexpr R max(A a, B b) { return static_cast<R>(a) > static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); }
EMU_MIN_MAX(int, int, int)
EMU_MIN_MAX(unsigned, unsigned, unsigned)
EMU_MIN_MAX(int, unsigned, unsigned)
EMU_MIN_MAX(unsigned, int, unsigned)
EMU_MIN_MAX(long, long, long)
EMU_MIN_MAX(long long, long long, long long)
EMU_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef EMU_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
constexpr int abs(int x) { return x < 0 ? -x : x; }

inline float __int_as_float(int x) { return emu::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return emu::bits_as<float>(x); }
inline int __float_as_int(float x) { return emu::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return emu::bits_as<unsigned>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }

inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return fabsf(x) == __builtin_inff(); }
inline bool isfinite(float x) { return fabsf(x) < __builtin_inff(); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.f), 1.f); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(static_cast<unsigned long long>(x) * y >> 32); }
inline int __mulhi(int x, int y) { return static_cast<int>(static_cast<long long>(x) * y >> 32); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long both = static_cast<unsigned long long>(y) << 32 | x;
  unsigned z = 0;
  for (int i = 0; i < 4; ++i) z |= (both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return z;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
  return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) << (n & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
  return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >> (n & 31));
}

template <class T>
inline void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
inline unsigned __cvta_generic_to_shared(const void* pointer) { return emu::shared_address(pointer); }
[[noreturn]] inline void __trap() { emu::fail("__trap()"); }
inline void __nanosleep(unsigned) { emu::poll(); }

// ---- the warp and the block ----

inline void __syncthreads() { emu::syncthreads(); }
inline void __syncwarp(unsigned lanes = emu::kAllLanes) { emu::syncwarp(lanes); }
inline void __threadfence() { emu::may_pause(); }
inline void __threadfence_block() { emu::may_pause(); }

namespace emu {

struct Exchange {
  u64 value, result;
  int source;
};
// Each lane gets the value of lane `source`.
template <class T>
inline T shuffle(const char* what, u32 lanes, T value, int source) {
  static_assert(sizeof(T) <= 8);
  Exchange item{0, 0, source};
  __builtin_memcpy(&item.value, &value, sizeof value);
  together(what, lanes, &item, [](void* const* items, u32 lanes) {
    for (int i = 0; i < 32; ++i)
      if (lanes >> i & 1) {
        Exchange& to = *static_cast<Exchange*>(items[i]);
        if (!(lanes >> to.source & 1)) fail("lane %d shuffles from lane %d, which is not in the mask %08x", i, to.source, lanes);
        to.result = static_cast<const Exchange*>(items[to.source])->value;
      }
  });
  __builtin_memcpy(&value, &item.result, sizeof value);
  return value;
}
inline int lane() { return static_cast<int>(thread_index.x & 31); }
inline int inside(int width) { return lane() & ~(width - 1); }  // first lane of the segment

// The same result for all lanes: fold of their values.
template <class T, class F>
inline T fold(const char* what, u32 lanes, T value, F) {
  struct Item {
    T value;
  } item{value};
  together(what, lanes, &item, [](void* const* items, u32 lanes) {
    bool first = true;
    T sum{};
    for (int i = 0; i < 32; ++i)
      if (lanes >> i & 1) sum = first ? static_cast<Item*>(items[i])->value : F::apply(sum, static_cast<Item*>(items[i])->value), first = false;
    for (int i = 0; i < 32; ++i)
      if (lanes >> i & 1) static_cast<Item*>(items[i])->value = sum;
  });
  return item.value;
}
struct Add {
  template <class T>
  static T apply(T a, T b) { return static_cast<T>(static_cast<u32>(a) + static_cast<u32>(b)); }
};
struct Max {
  template <class T>
  static T apply(T a, T b) { return a > b ? a : b; }
};
struct Min {
  template <class T>
  static T apply(T a, T b) { return a < b ? a : b; }
};
struct And {
  template <class T>
  static T apply(T a, T b) { return a & b; }
};
struct Or {
  template <class T>
  static T apply(T a, T b) { return a | b; }
};

inline u32 match_any(u32 lanes, u64 x) {
  struct Item {
    u64 x;
    u32 same;
  } item{x, 0};
  together("match.any.sync", lanes, &item, [](void* const* items, u32 lanes) {
    for (int i = 0; i < 32; ++i)
      for (int j = 0; j < 32; ++j)
        if ((lanes >> i & lanes >> j & 1) && static_cast<Item*>(items[i])->x == static_cast<Item*>(items[j])->x)
          static_cast<Item*>(items[i])->same |= 1u << j;
  });
  return item.same;
}

template <class T, class F>
inline T atomic(T* pointer, F&& change) {
  may_pause();
  const T before = *pointer;
  *pointer = change(before);
  return before;
}

}  // namespace emu

template <class T>
inline T __shfl_sync(unsigned lanes, T x, int source, int width = 32) {
  return emu::shuffle("__shfl_sync", lanes, x, emu::inside(width) + (source & (width - 1)));
}
template <class T>
inline T __shfl_xor_sync(unsigned lanes, T x, int mask, int width = 32) {
  const int source = emu::lane() ^ mask;
  return emu::shuffle("__shfl_xor_sync", lanes, x, source < emu::inside(width) + width ? source : emu::lane());
}
template <class T>
inline T __shfl_up_sync(unsigned lanes, T x, unsigned delta, int width = 32) {
  const int source = emu::lane() - static_cast<int>(delta);
  return emu::shuffle("__shfl_up_sync", lanes, x, source >= emu::inside(width) ? source : emu::lane());
}
template <class T>
inline T __shfl_down_sync(unsigned lanes, T x, unsigned delta, int width = 32) {
  const int source = emu::lane() + static_cast<int>(delta);
  return emu::shuffle("__shfl_down_sync", lanes, x, source < emu::inside(width) + width ? source : emu::lane());
}
inline unsigned __ballot_sync(unsigned lanes, int predicate) {
  return emu::fold("__ballot_sync", lanes, predicate ? 1u << emu::lane() : 0u, emu::Or{});
}
inline int __any_sync(unsigned lanes, int predicate) { return emu::fold("__any_sync", lanes, predicate != 0, emu::Or{}); }
inline int __all_sync(unsigned lanes, int predicate) { return emu::fold("__all_sync", lanes, predicate != 0, emu::And{}); }
template <class T>
inline unsigned __match_any_sync(unsigned lanes, T x) {
  emu::u64 bits = 0;
  __builtin_memcpy(&bits, &x, sizeof x);
  return emu::match_any(lanes, bits);
}
template <class T>
inline T __reduce_add_sync(unsigned lanes, T x) {
  return emu::fold("__reduce_add_sync", lanes, x, emu::Add{});
}
template <class T>
inline T __reduce_min_sync(unsigned lanes, T x) {
  return emu::fold("__reduce_min_sync", lanes, x, emu::Min{});
}
template <class T>
inline T __reduce_max_sync(unsigned lanes, T x) {
  return emu::fold("__reduce_max_sync", lanes, x, emu::Max{});
}
inline unsigned __reduce_and_sync(unsigned lanes, unsigned x) { return emu::fold("__reduce_and_sync", lanes, x, emu::And{}); }
inline unsigned __reduce_or_sync(unsigned lanes, unsigned x) { return emu::fold("__reduce_or_sync", lanes, x, emu::Or{}); }

#define EMU_ATOMICS(T)                                                                                                  \
  inline T atomicExch(T* p, T x) { return emu::atomic(p, [x](T) { return x; }); }                                       \
  inline T atomicAdd(T* p, T x) { return emu::atomic(p, [x](T y) { return static_cast<T>(y + x); }); }                  \
  inline T atomicMax(T* p, T x) { return emu::atomic(p, [x](T y) { return y > x ? y : x; }); }                          \
  inline T atomicMin(T* p, T x) { return emu::atomic(p, [x](T y) { return y < x ? y : x; }); }                          \
  inline T atomicCAS(T* p, T old, T x) { return emu::atomic(p, [old, x](T y) { return y == old ? x : y; }); }
EMU_ATOMICS(int)
EMU_ATOMICS(unsigned)
EMU_ATOMICS(unsigned long long)
#undef EMU_ATOMICS
inline float atomicAdd(float* p, float x) { return emu::atomic(p, [x](float y) { return y + x; }); }
inline int atomicSub(int* p, int x) { return emu::atomic(p, [x](int y) { return y - x; }); }
inline unsigned atomicSub(unsigned* p, unsigned x) { return emu::atomic(p, [x](unsigned y) { return y - x; }); }
inline int atomicOr(int* p, int x) { return emu::atomic(p, [x](int y) { return y | x; }); }
inline unsigned atomicOr(unsigned* p, unsigned x) { return emu::atomic(p, [x](unsigned y) { return y | x; }); }
inline int atomicAnd(int* p, int x) { return emu::atomic(p, [x](int y) { return y & x; }); }
inline unsigned atomicAnd(unsigned* p, unsigned x) { return emu::atomic(p, [x](unsigned y) { return y & x; }); }
