// What an expert does between its two products, and the bias before it.
#pragma once
#include "math/softmax.cuh"
#include "moe/params.cuh"

namespace fm {

// Two sigmoids for three special functions instead of four: 1 / a = b / (a b). Below -41 they are 0 instead
// of next to nothing, so that the product of two denominators stays finite.
FM_DEVICE void sigmoids(float x, float y, float& of_x, float& of_y) {
  constexpr float kLeast = -41.f;
  const float a = 1.f + exp2_approx(-kLog2e * fmaxf(x, kLeast)),
              b = 1.f + exp2_approx(-kLog2e * fmaxf(y, kLeast));
  const float inverse = rcp_approx_ftz_f32(a * b);
  of_x = x < kLeast ? 0.f : b * inverse, of_y = y < kLeast ? 0.f : a * inverse;
}
// x Phi(x), with erfc as a polynomial of 1 / (1 + c |x|) times a Gaussian (Abramowitz and Stegun 7.1.26): no
// branch, absolute error 4e-7.
FM_DEVICE float gelu(float x) {
  const float t = rcp_approx_ftz_f32(fmaf(0.23164189f, fabsf(x), 1.f));
  const float y = fmaf(fmaf(fmaf(fmaf(0.5307027145f, t, -0.7265760135f), t, 0.7107068705f), t, -0.142248368f),
                       t, 0.127414796f) *
                  t;
  const float tail = y * exp2_approx(-0.5f * kLog2e * x * x);  // Phi(-|x|)
  return x * (x < 0.f ? tail : 1.f - tail);
}
// x (1 + tanh(u)) / 2 = x sigmoid(2 u)
FM_DEVICE float gelu_tanh_argument(float x) { return 1.5957691f * (x + 0.044715f * x * x * x); }
// NaN stays NaN, as fminf and fmaxf would not leave it.
FM_DEVICE float at_least(float x, float low) { return x < low ? low : x; }
FM_DEVICE float at_most(float x, float high) { return x > high ? high : x; }

// x = f(x, up), where up is the value of x kUp tiles of 8 columns further on; for the first kTiles tiles.
template <int kTiles, int kUp, int kN, class F>
FM_DEVICE void for_each_pair(float (&x)[kN][4], F&& f) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i] = f(x[n][i], x[n + kUp][i]);
}
// x = f(x, up, s) with s = sigmoid(argument(x)), two at a time.
template <int kTiles, int kUp, int kN, class Argument, class F>
FM_DEVICE void for_each_sigmoid(float (&x)[kN][4], Argument&& argument, F&& f) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      float s[2];
      sigmoids(argument(x[n][i]), argument(x[n][i + 1]), s[0], s[1]);
      x[n][i] = f(x[n][i], x[n + kUp][i], s[0]), x[n][i + 1] = f(x[n][i + 1], x[n + kUp][i + 1], s[1]);
    }
}

// The first half of the tiles are gates, the second half up values: gate = act(gate) * up, and gpt-oss'
// variant with limits.
template <int kN>
FM_DEVICE void activate_gated(const GroupedGemmParams& p, float (&x)[kN][4]) {
  constexpr int kHalf = kN / 2;
  auto times_up = [](float g, float u, float s) { return g * s * u; };
  if (p.activation == kSwiglu) {
    for_each_sigmoid<kHalf, kHalf>(x, [](float g) { return g; }, times_up);
  } else if (p.activation == kGeglu) {
    for_each_pair<kHalf, kHalf>(x, [](float g, float u) { return gelu(g) * u; });
  } else if (p.activation == kGegluTanh) {
    for_each_sigmoid<kHalf, kHalf>(x, gelu_tanh_argument, times_up);
  } else {
    const float alpha = p.alpha, limit = p.limit;
    for_each_sigmoid<kHalf, kHalf>(
        x, [=](float g) { return alpha * at_most(g, limit); },
        [=](float g, float u, float s) {
          return at_most(g, limit) * s * (at_least(at_most(u, limit), -limit) + 1.f);
        });
  }
}

// swiglu of gates that are at most the limit and up values within +-limit.
template <class Params, int kN>
FM_DEVICE void activate_gated(const Clamped<Params>& p, float (&x)[kN][4]) {
  const float limit = p.limit;
  for_each_sigmoid<kN / 2, kN / 2>(
      x, [=](float g) { return at_most(g, limit); },
      [=](float g, float u, float s) { return at_most(g, limit) * s * at_least(at_most(u, limit), -limit); });
}

template <int kN>
FM_DEVICE void activate(const GroupedGemmParams& p, float (&x)[kN][4]) {
  if (p.activation == kIdentity) return;
  if (p.activation == kGelu) {
    for_each_pair<kN, 0>(x, [](float g, float) { return gelu(g); });
  } else if (p.activation == kGeluTanh) {
    for_each_sigmoid<kN, 0>(x, gelu_tanh_argument, [](float g, float, float s) { return g * s; });
  } else if (p.activation == kRelu) {
    for_each_pair<kN, 0>(x, [](float g, float) { return at_least(g, 0.f); });
  } else {
    for_each_pair<kN, 0>(x, [](float g, float) { return at_least(g, 0.f) * at_least(g, 0.f); });
  }
}

// The bias of a warp's columns, each lane one of 32: loaded before the products, so that nobody waits for it
// after them. The first half of the kTiles tiles of 8 columns lies from column `col` on; the second half at
// the same columns of up (kGated), or from `second` on.
template <int kTiles, bool kGated>
struct Bias {
  static constexpr int kHalf = kTiles * 4;  // columns
  float held[div_up(kTiles, 4)];

  FM_DEVICE void load(const GroupedGemmParams& p, int group, int col, int second) {
    if (p.bias == nullptr) return;
#pragma unroll
    for (int i = 0; i < div_up(kTiles, 4); ++i) {
      const int c = i * 32 + lane_id(), half = c / kHalf,
                column = half == 0 ? col + c : (kGated ? col : second) + c - kHalf;
      const i64 at =
          group * p.bias_stride_e + (kGated ? half : 0) * p.bias_stride_half + column * p.bias_stride_n;
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
  return load_float(p.row_weights, t * p.row_weights_stride_t + k * p.row_weights_stride_k,
                    p.row_weights_dtype);
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
