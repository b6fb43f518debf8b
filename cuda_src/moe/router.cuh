// The router: which experts a token goes to, and with what weight.
//
//   p = softmax(logits), sigmoid(logits) or sqrt(softplus(logits))    choice = p + bias, or the logits where there is no bias
//   ids = the top_k largest choices, in the best topk_groups of the groups; ties: the lower id, the lower group
//   weights = p[ids], divided by their sum when asked, times a factor
//
// A group's score is its largest choice, with a bias the sum of its two largest (DeepSeek-V3, arXiv:2412.19437, section 2.1.2). Logits
// are clamped to the finite range of fp32 and a NaN counts as its lowest value, so that every token gets distinct ids and finite
// weights. Overwrites topk_weights and topk_ids; with kStats also a row of partial sums for each warp, which MoeRouterStats adds in a
// fixed order. Same bits in every run.
//
// One warp takes a token; lane l holds the experts l, l + 32, ... Floats are compared as integers of the same order: the hardware
// reduces those over a warp in one instruction.
#pragma once
#include "math/reduce.cuh"
#include "moe/params.cuh"
#include "ptx/cluster.cuh"

namespace fm {

template <int kPerLane_, bool kStats_>
struct MoeRouter {
  static constexpr int kPerLane = kPerLane_, kWarps = 4, kThreads = 32 * kWarps;
  static constexpr bool kStats = kStats_;
  static constexpr u32 kAll = 0xffffffffu;

  // One token as its warp sees it: logits, and their choices as ordered integers, 0 for what cannot be chosen (any more).
  struct Token {
    float logit[kPerLane];
    u32 choice[kPerLane];
    float top, inverse_sum;  // of the softmax
  };
  struct Sums {
    float probability[kPerLane], z;
    int count[kPerLane];
  };

  FM_DEVICE static void run(const MoeRouterParams& p) {
    start_after_last_grid();
    Sums sums = {};
    const int first = static_cast<int>(blockIdx.x) * p.tokens_per_block;
    for (int t = first + warp_id(); t < min(p.tokens, first + p.tokens_per_block); t += kWarps) route(p, t, sums);
    if constexpr (kStats) {
      const i64 row = static_cast<i64>(blockIdx.x) * kWarps + warp_id();
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int e = expert(j);
        if (e < p.experts) p.partial_probabilities[row * p.experts + e] = sums.probability[j], p.partial_counts[row * p.experts + e] = sums.count[j];
      }
      if (lane_id() == 0) p.partial_z[row] = sums.z;
    }
  }

  FM_DEVICE static int expert(int j) { return j * 32 + lane_id(); }

  FM_DEVICE static void route(const MoeRouterParams& p, int t, Sums& sums) {
    Token token;
    read(p, t, token);
    if (p.groups > 1) keep_best_groups(p, token);

    int id = 0;          // lane k has the k-th choice
    float logit = 0.f;
    for (int k = 0; k < p.top_k; ++k) {
      const int e = take_largest(token.choice);
      float chosen = 0.f;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j)
        if (expert(j) == e) {
          chosen = token.logit[j];
          if constexpr (kStats) ++sums.count[j];
        }
      chosen = __shfl_sync(kAll, chosen, e & 31);
      if (lane_id() == k) id = e, logit = chosen;
    }

    const bool mine = lane_id() < p.top_k;
    float weight;
    if (p.scoring_func == kSoftmax && p.renormalize) {  // the softmax over the chosen logits, which never is 0 / 0
      const float top = warp_max(mine ? logit : -infinity());
      const float e = mine ? expf(logit - top) : 0.f;
      weight = e / warp_sum(e);
    } else {
      weight = mine ? probability(p, token, logit) : 0.f;
      if (p.renormalize) weight /= warp_sum(weight) + 1e-20f;
    }
    if (mine) {
      const i64 at = static_cast<i64>(t) * p.top_k + lane_id();
      p.topk_weights[at] = weight * p.scale, p.topk_ids[at] = id;
    }
    if constexpr (kStats) add_to(p, token, sums);
  }

  FM_DEVICE static void read(const MoeRouterParams& p, int t, Token& token) {
    constexpr float kMost = 3.4028234663852886e38f;
    float top = -kMost;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const bool real = expert(j) < p.experts;
      const float x = real ? load_float(p.logits, t * p.logits_stride + expert(j), p.logits_dtype) : -kMost;
      token.logit[j] = fminf(fmaxf(x, -kMost), kMost);  // fmaxf drops a NaN
      top = fmaxf(top, token.logit[j]);
    }
    token.top = warp_max(top), token.inverse_sum = 0.f;
    if (kStats || (p.scoring_func == kSoftmax && (p.bias != nullptr || !p.renormalize))) {
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) sum += expert(j) < p.experts ? expf(token.logit[j] - token.top) : 0.f;
      token.inverse_sum = 1.f / warp_sum(sum);
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int e = expert(j);
      float choice = token.logit[j];
      if (p.bias != nullptr && e < p.experts) choice = probability(p, token, choice) + load_float(p.bias, e, p.bias_dtype);
      token.choice[j] = e < p.experts ? to_ordered(choice) : 0;
    }
  }

  FM_DEVICE static float probability(const MoeRouterParams& p, const Token& token, float x) {
    if (p.scoring_func == kSoftmax) return expf(x - token.top) * token.inverse_sum;
    if (p.scoring_func == kSigmoid) return 1.f / (1.f + expf(-x));
    return sqrtf(fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))));
  }

  // Choices outside of the best groups become 0. Lane l holds the scores of the groups l, l + 32, ...
  FM_DEVICE static void keep_best_groups(const MoeRouterParams& p, Token& token) {
    const int size = p.experts / p.groups;
    u32 score[kPerLane] = {};
    for (int g = 0; g < p.groups; ++g) {
      const u32 of_group = group_score(p, token, g * size, size);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (expert(i) == g) score[i] = of_group;
    }
    u32 kept = 0;  // bit i: the lane's i-th group is among the best
    for (int n = 0; n < p.topk_groups; ++n) {
      const int g = take_largest(score);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (expert(i) == g) kept |= 1u << i;
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int g = min(expert(j), p.experts - 1) / size;
      if ((__shfl_sync(kAll, kept, g & 31) >> (g >> 5) & 1) == 0) token.choice[j] = 0;
    }
  }

  // The largest choice of the experts begin .. begin + size - 1, or the sum of the two largest.
  FM_DEVICE static u32 group_score(const MoeRouterParams& p, const Token& token, int begin, int size) {
    u32 first = 0, second = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int e = expert(j);
      const u32 choice = e >= begin && e < begin + size ? token.choice[j] : 0;
      second = max(second, min(first, choice)), first = max(first, choice);
    }
    const u32 best = __reduce_max_sync(kAll, first);
    if (p.bias == nullptr || size == 1) return best;
    const int holder = __ffs(static_cast<int>(__ballot_sync(kAll, first == best))) - 1;
    const u32 next = __reduce_max_sync(kAll, lane_id() == holder ? second : first);
    return to_ordered(from_ordered(best) + from_ordered(next));
  }

  // The place j * 32 + lane of the largest value of all lanes, the lowest one among equals; the value becomes 0.
  FM_DEVICE static int take_largest(u32 (&value)[kPerLane]) {
    u32 best = 0;
    int place = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j)
      if (value[j] > best) best = value[j], place = expert(j);
    place = static_cast<int>(__reduce_min_sync(kAll, best == __reduce_max_sync(kAll, best) ? static_cast<u32>(place) : kAll));
#pragma unroll
    for (int j = 0; j < kPerLane; ++j)
      if (expert(j) == place) value[j] = 0;
    return place;
  }

  // Probabilities of all experts add up to 1 here, whatever the scoring function.
  FM_DEVICE static void add_to(const MoeRouterParams& p, const Token& token, Sums& sums) {
    float total = 1.f;
    if (p.scoring_func != kSoftmax) {
      total = 0.f;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) total += expert(j) < p.experts ? probability(p, token, token.logit[j]) : 0.f;
      total = warp_sum(total) + 1e-20f;
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) sums.probability[j] += probability(p, token, token.logit[j]) / total;
    const float lse = token.top - logf(token.inverse_sum);
    sums.z += lse * lse;
  }
};

// What the router's warps have summed: counts, and the two losses. One block.
//   load balancing: experts * sum_e counts[e] / tokens * mean probability of e (arXiv:2101.03961, equations 4 to 6)
//   z: mean of logsumexp(logits)^2 (arXiv:2202.08906, equation 5)
// expert_counts[e] is what is kept of the choices of e when it takes at most `capacity`, dropped[e] the rest. Overwrites all four.
struct MoeRouterStats {
  static constexpr int kThreads = 1024, kWarps = 32;
  struct Smem {
    static constexpr int kProbability = 0, kCount = 4 * kThreads, kBytes = 8 * kThreads;
  };

  FM_DEVICE static void run(const MoeRouterStatsParams& p) {
    start_after_last_grid();
    extern __shared__ __align__(128) u8 smem[];
    float* s_probability = reinterpret_cast<float*>(smem + Smem::kProbability);
    int* s_count = reinterpret_cast<int*>(smem + Smem::kCount);
    const int warp = warp_id(), lane = lane_id();
    const float one_token = p.tokens > 0 ? 1.f / static_cast<float>(p.tokens) : 0.f;
    float product = 0.f;
    for (int first = 0; first < p.experts; first += 32) {
      const int e = first + lane;
      float probability = 0.f;
      int count = 0;
      if (e < p.experts)
        for (int row = warp; row < p.rows; row += kWarps) {
          probability += p.partial_probabilities[static_cast<i64>(row) * p.experts + e];
          count += p.partial_counts[static_cast<i64>(row) * p.experts + e];
        }
      s_probability[warp * 32 + lane] = probability, s_count[warp * 32 + lane] = count;
      __syncthreads();
      if (warp == 0 && e < p.experts) {
        for (int i = 1; i < kWarps; ++i) probability += s_probability[i * 32 + lane], count += s_count[i * 32 + lane];
        const int kept = min(count, p.capacity);
        p.expert_counts[e] = kept, p.dropped[e] = count - kept;
        product += static_cast<float>(count) * one_token * (probability * one_token);
      }
      __syncthreads();
    }
    if (warp == 0) {
      float z = 0.f;
      for (int row = lane; row < p.rows; row += 32) z += p.partial_z[row];
      z = warp_sum(z), product = warp_sum(product);
      if (lane == 0) *p.load_balancing_loss = static_cast<float>(p.experts) * product, *p.z_loss = z * one_token;
    }
  }
};

// Takes back what an expert cannot hold: assignments that are not among its first `capacity` get id -1 and weight 0.
struct MoeCapacity {
  static constexpr int kThreads = 256;

  FM_DEVICE static void run(const MoeCapacityParams& p) {
    start_after_last_grid();
    const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (i >= p.assignments) return;
    const int e = p.topk_ids[i];
    if (p.inverse_indices[i] - p.offsets[e] >= p.capacity) p.topk_ids[i] = -1, p.topk_weights[i] = 0.f;
  }
};

}  // namespace fm
