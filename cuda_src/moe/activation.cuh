// What an expert does between its two products, and the bias before it.
#pragma once
#include "moe/params.cuh"

namespace fm {

FM_DEVICE float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
FM_DEVICE float silu(float x) { return x * sigmoid(x); }
FM_DEVICE float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678f)); }
// x (1 + tanh(u)) / 2 = x sigmoid(2 u)
FM_DEVICE float gelu_tanh(float x) { return x * sigmoid(1.5957691f * (x + 0.044715f * x * x * x)); }

// x = f(x, up), where up is the value of x kUp tiles of 8 columns further on; for the first kTiles tiles.
template <int kTiles, int kUp, int kN, class F>
FM_DEVICE void for_each_pair(float (&x)[kN][4], F&& f) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i] = f(x[n][i], x[n + kUp][i]);
}

// The first half of the tiles are gates, the second half up values: gate = act(gate) * up, and gpt-oss' variant with limits.
template <int kN>
FM_DEVICE void activate_gated(const GroupedGemmParams& p, float (&x)[kN][4]) {
  constexpr int kHalf = kN / 2;
  if (p.activation == kSwiglu) {
    for_each_pair<kHalf, kHalf>(x, [](float g, float u) { return silu(g) * u; });
  } else if (p.activation == kGeglu) {
    for_each_pair<kHalf, kHalf>(x, [](float g, float u) { return gelu(g) * u; });
  } else if (p.activation == kGegluTanh) {
    for_each_pair<kHalf, kHalf>(x, [](float g, float u) { return gelu_tanh(g) * u; });
  } else {
    const float alpha = p.alpha, limit = p.limit;
    for_each_pair<kHalf, kHalf>(x, [alpha, limit](float g, float u) {
      g = fminf(g, limit), u = fminf(fmaxf(u, -limit), limit);
      return (u + 1.f) * g * sigmoid(alpha * g);
    });
  }
}

template <int kN>
FM_DEVICE void activate(const GroupedGemmParams& p, float (&x)[kN][4]) {
  if (p.activation == kIdentity) return;
  if (p.activation == kGelu) {
    for_each_pair<kN, 0>(x, [](float g, float) { return gelu(g); });
  } else if (p.activation == kGeluTanh) {
    for_each_pair<kN, 0>(x, [](float g, float) { return gelu_tanh(g); });
  } else if (p.activation == kRelu) {
    for_each_pair<kN, 0>(x, [](float g, float) { return fmaxf(g, 0.f); });
  } else {
    for_each_pair<kN, 0>(x, [](float g, float) { return fmaxf(g, 0.f) * fmaxf(g, 0.f); });
  }
}

// The bias of a warp's columns, each lane one of 32: loaded before the products, so that nobody waits for it after them. The first half
// of the kTiles tiles of 8 columns lies from column `col` on; the second half at the same columns of up (kGated), or from `second` on.
template <int kTiles, bool kGated>
struct Bias {
  static constexpr int kHalf = kTiles * 4;  // columns
  float held[div_up(kTiles, 4)];

  FM_DEVICE void load(const GroupedGemmParams& p, int group, int col, int second) {
    if (p.bias == nullptr) return;
#pragma unroll
    for (int i = 0; i < div_up(kTiles, 4); ++i) {
      const int c = i * 32 + lane_id(), half = c / kHalf, column = half == 0 ? col + c : (kGated ? col : second) + c - kHalf;
      const i64 at = group * p.bias_stride_e + (kGated ? half : 0) * p.bias_stride_half + column * p.bias_stride_n;
      held[i] = half < 2 && column < p.n ? load_float(p.bias, at, p.bias_dtype) : 0.f;
    }
  }

  // x += bias
  FM_DEVICE void add_to(const GroupedGemmParams& p, float (&x)[kTiles][4]) const {
    if (p.bias == nullptr) return;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float b = __shfl_sync(0xffffffffu, held[n / 4], n % 4 * 8 + 2 * (lane_id() & 3) + e);
        x[n][e] += b, x[n][2 + e] += b;
      }
  }
};

// The factor of row `row` of out, which the router gave to the assignment that is gathered there.
FM_DEVICE float row_weight_of(const GroupedGemmParams& p, int row) {
  const int index = p.gather_indices[row], t = index / p.gather_divisor, k = index - t * p.gather_divisor;
  return load_float(p.row_weights, t * p.row_weights_stride_t + k * p.row_weights_stride_k, p.row_weights_dtype);
}

// The two rows of each thread times their factors; row: of the warp's first, `rows` of them exist.
template <int kN>
FM_DEVICE void scale_by_row_weights(const GroupedGemmParams& p, int row, int rows, float (&x)[kN][4]) {
  if (p.row_weights == nullptr) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int mine = i * 8 + (lane_id() >> 2);
    const float weight = mine < rows ? row_weight_of(p, row + mine) : 0.f;
#pragma unroll
    for (int n = 0; n < kN; ++n) x[n][2 * i] *= weight, x[n][2 * i + 1] *= weight;
  }
}

}  // namespace fm
