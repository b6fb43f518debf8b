// The bias of the scores that a thread of the portable kernel will hold, of any type and strides. It is
// fetched into registers before the product that makes the scores, so that the memory's time passes behind
// it. Pairs of neighbouring columns come at once where they lie side by side.
#pragma once
#include "attention/params.cuh"
#include "tile/mask.cuh"

namespace fm {

// What the kernel asks where its variant has no bias.
struct NoBiasInRegisters {
  FM_DEVICE void fetch(const AttentionFwdParams&, const void*, int, int, const BandMask&) {}
  template <int kM, int kN>
  FM_DEVICE void add(const AttentionFwdParams&, float (&)[kM][kN][4]) const {}
};

template <int kM, int kN>
struct BiasInRegisters {
  // As they lie in memory: columns 2 t and 2 t + 1 of a row in the two halves or bytes of `low`, or in both.
  u32 low[kM][kN][2], high[kM][kN][2];

  // g_bias: of row 0 and column 0 of the band, null: none; row, col: the warp's first score.
  FM_DEVICE void fetch(const AttentionFwdParams& p, const void* g_bias, int row, int col,
                       const BandMask& band) {
    if (g_bias == nullptr) return;
    if (p.bias_dtype == kFP32) fetch_as<u32, uint2>(p, g_bias, row, col, band);
    else if (p.bias_dtype == kBool) fetch_as<u8, u16>(p, g_bias, row, col, band);
    else fetch_as<u16, u32>(p, g_bias, row, col, band);
  }

  FM_DEVICE void add(const AttentionFwdParams& p, float (&r_s)[kM][kN][4]) const {
    if (p.bias == nullptr) return;
    if (p.bias_dtype == kFP32)
      each(r_s, [](float& x, float& y, u32 low, u32 high) {
        x += __uint_as_float(low), y += __uint_as_float(high);
      });
    else if (p.bias_dtype == kBF16)
      each(r_s, [](float& x, float& y, u32 low, u32) { x += low_of<bf16>(low), y += high_of<bf16>(low); });
    else if (p.bias_dtype == kFP16)
      each(r_s, [](float& x, float& y, u32 low, u32) { x += low_of<fp16>(low), y += high_of<fp16>(low); });
    else
      each(r_s, [](float& x, float& y, u32 low, u32) {
        x = low & 0xff ? x : -infinity(), y = low & 0xff00 ? y : -infinity();
      });
  }

 private:
  template <class F>
  FM_DEVICE void each(float (&r_s)[kM][kN][4], F&& f) const {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) f(r_s[m][n][2 * i], r_s[m][n][2 * i + 1], low[m][n][i], high[m][n][i]);
  }

  // What lies outside of the band's rows is read from its last one, and columns behind it are 0: both are
  // masked.
  template <class Value, class Pair>
  FM_DEVICE void fetch_as(const AttentionFwdParams& p, const void* g_bias, int row, int col,
                          const BandMask& band) {
    const int g = lane_id() >> 2, first = col + 2 * (lane_id() & 3);
    const Value* g_first = static_cast<const Value*>(g_bias) + first * p.bias_stride_k;
    const bool pairs = p.bias_stride_k == 1 && p.bias_stride_q % 2 == 0 && col + 8 * kN <= band.cols &&
                       reinterpret_cast<u64>(g_first) % sizeof(Pair) == 0;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Value* g_row = g_first + min(row + m * 16 + i * 8 + g, band.rows - 1) * p.bias_stride_q;
        if (pairs) {
#pragma unroll
          for (int n = 0; n < kN; ++n)
            put(low[m][n][i], high[m][n][i], *reinterpret_cast<const Pair*>(g_row + n * 8));
        } else {
#pragma unroll
          for (int n = 0; n < kN; ++n) {
            const Value* g_pair = g_row + n * 8 * p.bias_stride_k;
            const u32 x = first + n * 8 < band.cols ? *g_pair : 0;
            const u32 y = first + n * 8 + 1 < band.cols ? g_pair[p.bias_stride_k] : 0;
            low[m][n][i] = sizeof(Value) == 4 ? x : x | y << 8 * sizeof(Value) % 32;
            high[m][n][i] = y;
          }
        }
      }
  }
  FM_DEVICE static void put(u32& low, u32& high, uint2 pair) { low = pair.x, high = pair.y; }
  FM_DEVICE static void put(u32& low, u32& high, u32 pair) { low = pair, high = 0; }
};

}  // namespace fm
