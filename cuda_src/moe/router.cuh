// The router: which experts a token goes to, and with what weight.
//
//   p = softmax(logits), sigmoid(logits) or sqrt(softplus(logits))
//   choice = p + bias, or the logits where there is no bias
//   ids = the top_k largest choices, in the best topk_groups of the groups; ties: the lower id or group
//   weights = p[ids], divided by their sum when asked, times a factor
//
// A group's score is its largest choice, with a bias the sum of its two largest (DeepSeek-V3,
// arXiv:2412.19437, section 2.1.2). Logits are clamped to the finite range of fp32 and a NaN counts as its
// lowest value, so that every token gets distinct ids and finite weights. Overwrites topk_weights and
// topk_ids; with kStats also a row of partial sums for each warp, which MoeRouterStats adds in a fixed order.
// Same bits in every run.
//
// One warp takes a token. A lane holds kPerLane experts in a row, the last lane the first ones: the lowest
// expert among equals is then in the highest lane of a ballot, which takes one instruction to find. Each lane
// sorts its experts once, by fours, so that a choice only looks at the heads of these lists. Floats are
// compared as integers of the same order: the hardware reduces those over a warp in one instruction. What
// limits this kernel is the number of its instructions.
#pragma once
#include "math/reduce.cuh"
#include "moe/params.cuh"
#include "ptx/cluster.cuh"

namespace fm {

template <int kPerLane_, bool kStats_>
struct MoeRouter {
  static constexpr int kPerLane = kPerLane_, kWarps = 4, kThreads = 32 * kWarps;
  static constexpr bool kStats = kStats_;
  static constexpr int kAtOnce = kPerLane <= 8 ? 8 : 4;  // choices, of the unrolled loop
  static constexpr u32 kAll = 0xffffffffu;

  // One token as its warp sees it: logits, and their choices as ordered integers, 0 for what cannot be
  // chosen.
  struct Token {
    float logit[kPerLane];
    u32 choice[kPerLane];
    float top, inverse_sum;  // of the softmax; only where it is asked for
  };
  // Values of a lane, the largest first, 0 behind the last. place[i]: which values of the lane those of list
  // i are, a byte for each, the first one lowest, and 0 behind the last.
  struct Lists {
    static constexpr int kDepth = min_of(kPerLane, 4), kCount = kPerLane / kDepth;
    u32 value[kCount][kDepth], place[kCount];
  };
  struct Sums {
    float probability[kPerLane], z;
    int count[kPerLane];
  };

  FM_DEVICE static void run(const MoeRouterParams& p) {
    start_after_last_grid();
    Sums sums = {};
    // Without statistics tokens_per_block is kWarps: without a loop nothing is computed before it is needed.
    if constexpr (!kStats) {
      const int t = static_cast<int>(blockIdx.x) * kWarps + warp_id();
      if (t < p.tokens) route(p, t, sums);
    } else {
      const int first = static_cast<int>(blockIdx.x) * p.tokens_per_block;
      for (int t = first + warp_id(); t < min(p.tokens, first + p.tokens_per_block); t += kWarps)
        route(p, t, sums);
      const i64 row = static_cast<i64>(blockIdx.x) * kWarps + warp_id();
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int e = expert(j);
        if (e >= p.experts) continue;
        p.partial_probabilities[row * p.experts + e] = sums.probability[j];
        p.partial_counts[row * p.experts + e] = sums.count[j];
      }
      if (lane_id() == 0) p.partial_z[row] = sums.z;
    }
  }

  FM_DEVICE static int expert(int j) { return (~lane_id() & 31) * kPerLane + j; }

  FM_DEVICE static void route(const MoeRouterParams& p, int t, Sums& sums) {
    Token token;
    const i64 row = static_cast<u32>(t) * p.logits_stride;
    read(p, row, token);
    if (p.groups > 1) keep_best_groups(p, token);

    Lists lists = sorted(token.choice);
    // Lane k has the k-th choice; what lanes behind the last one hold is an expert, but counts for nothing.
    u32 taken = 31 << 8;
#pragma unroll kAtOnce
    for (int k = 0; k < 32; ++k) {
      if (k % 4 == 0 && k >= p.top_k) break;
      const u32 place = take_largest(lists);
      if (lane_id() == k) taken = place;
      if constexpr (kStats) {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) sums.count[j] += k < p.top_k && place == place_of(lane_id(), j);
      }
    }
    const u32 id = (~(taken >> 8) & 31) * kPerLane + (taken & 0xff);

    const bool mine = lane_id() < p.top_k;
    float logit = clamp(load_float(p.logits, row + id, p.logits_dtype));
    if (!mine) logit = -infinity();  // whose weight is 0, however it is scored

    float weight;
    if (p.scoring_func == kSoftmax && p.renormalize) {
      // The softmax over the chosen logits, which never is 0 / 0.
      const float top = p.bias == nullptr ? __shfl_sync(kAll, logit, 0) : warp_max(logit);
      const float e = expf(logit - top);
      weight = e * rcp_approx_ftz_f32(warp_sum(e));  // of 1 to 32
    } else {
      weight = probability(p, token, logit);
      if (p.renormalize) weight /= warp_sum(weight) + 1e-20f;
    }
    if (mine) {
      const i64 at = static_cast<i64>(t) * p.top_k + lane_id();
      p.topk_weights[at] = weight * p.scale, p.topk_ids[at] = static_cast<int>(id);
    }
    if constexpr (kStats) {
      load_logits(p, row, token);  // which need no registers meanwhile
      add_to(p, token, sums);
    }
  }

  static constexpr float kMost = 3.4028234663852886e38f;
  FM_DEVICE static float clamp(float x) { return fminf(fmaxf(x, -kMost), kMost); }  // fmaxf drops a NaN

  FM_DEVICE static void load_logits(const MoeRouterParams& p, i64 row, Token& token) {
    load(p.logits, row, p.logits_dtype, p.experts, token.logit);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) token.logit[j] = clamp(token.logit[j]);
  }

  FM_DEVICE static void read(const MoeRouterParams& p, i64 row, Token& token) {
    load_logits(p, row, token);
    float top = -kMost;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const u32 bits = __float_as_uint(token.logit[j] + 0.f);
      const u32 sign = static_cast<u32>(static_cast<int>(bits) >> 31);
      token.choice[j] = bits ^ (sign | 0x80000000u);  // to_ordered of what is finite
      top = fmaxf(top, token.logit[j]);
    }
    if (kStats || p.bias != nullptr || (p.scoring_func == kSoftmax && !p.renormalize))
      look_at_all(p, top, token);
    if (p.experts < 32 * kPerLane) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j)
        if (expert(j) >= p.experts) token.choice[j] = 0;
    }
  }

  // What depends on the scores of all experts: the softmax and choices with a bias.
  FM_DEVICE static void look_at_all(const MoeRouterParams& p, float top, Token& token) {
    if (kStats || p.scoring_func == kSoftmax) {
      token.top = warp_max(top);
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j)
        sum += expert(j) < p.experts ? expf(token.logit[j] - token.top) : 0.f;
      token.inverse_sum = 1.f / warp_sum(sum);
    }
    if (p.bias != nullptr) {
      float bias[kPerLane];
      load(p.bias, 0, p.bias_dtype, p.experts, bias);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j)
        token.choice[j] = to_ordered(probability(p, token, token.logit[j]) + bias[j]);
    }
  }

  // The lane's values of an array that has one for each expert; the lowest one beyond its end.
  FM_DEVICE static void load(const void* g_pointer, i64 begin, int dtype, int experts, float (&x)[kPerLane]) {
    if (dtype == kFP32) load(static_cast<const fp32*>(g_pointer) + (begin + expert(0)), experts, x);
    else if (dtype == kBF16) load(static_cast<const bf16*>(g_pointer) + (begin + expert(0)), experts, x);
    else load(static_cast<const fp16*>(g_pointer) + (begin + expert(0)), experts, x);
  }
  template <class E>
  FM_DEVICE static void load(const E* g_mine, int experts, float (&x)[kPerLane]) {
    constexpr int kVector = min_of(kPerLane, 16 / sizeof(E));
    struct alignas(kVector * sizeof(E)) Vector {
      E value[kVector];
    };
    if (expert(kPerLane) <= experts && reinterpret_cast<u64>(g_mine) % sizeof(Vector) == 0) {
#pragma unroll
      for (int i = 0; i < kPerLane; i += kVector) {
        const Vector v = *reinterpret_cast<const Vector*>(g_mine + i);
#pragma unroll
        for (int j = 0; j < kVector; ++j) x[i + j] = to_float(v.value[j]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) x[j] = expert(j) < experts ? to_float(g_mine[j]) : -kMost;
    }
  }

  FM_DEVICE static float probability(const MoeRouterParams& p, const Token& token, float x) {
    if (p.scoring_func == kSoftmax) return expf(x - token.top) * token.inverse_sum;
    if (p.scoring_func == kSigmoid) return 1.f / (1.f + expf(-x));
    return sqrtf(fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))));
  }

  // Choices outside of the best groups become 0. A lane holds the scores of kPerLane groups as it holds
  // experts.
  FM_DEVICE static void keep_best_groups(const MoeRouterParams& p, Token& token) {
    const int size = p.experts / p.groups;
    u32 score[kPerLane] = {};
    for (int g = 0; g < p.groups; ++g) {
      const u32 of_group = group_score(p, token, g * size, size);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (expert(i) == g) score[i] = of_group;
    }
    Lists lists = sorted(score);
    u32 kept = 0;  // bit i: the lane's i-th group is among the best
    for (int n = 0; n < p.topk_groups; ++n) {
      const u32 place = take_largest(lists);
      if (static_cast<int>(place >> 8) == lane_id()) kept |= 1u << (place & 0xff);
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int g = min(expert(j), p.experts - 1) / size;
      if ((__shfl_sync(kAll, kept, 31 - g / kPerLane) >> (g % kPerLane) & 1) == 0) token.choice[j] = 0;
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

  // Each list by exchanges of neighbours only, so that equals stay in the order of their places.
  FM_DEVICE static Lists sorted(const u32 (&value)[kPerLane]) {
    constexpr int kDepth = Lists::kDepth;
    Lists lists;
#pragma unroll
    for (int i = 0; i < Lists::kCount; ++i) {
      u32 (&v)[kDepth] = lists.value[i];
      u32 place = (0x03020100u & kAll >> (32 - 8 * kDepth)) + 0x01010101u * kDepth * i;
#pragma unroll
      for (int n = 0; n < kDepth; ++n) v[n] = value[kDepth * i + n];
#pragma unroll
      for (int round = 0; round < kDepth; ++round)
#pragma unroll
        for (int n = round % 2; n < kDepth - 1; n += 2) {
          if (v[n] < v[n + 1]) place = __byte_perm(place, 0, 0x3210 ^ (n % 2 == 0 ? 0x11 : 0x33) << 4 * n);
          const u32 larger = max(v[n], v[n + 1]);
          v[n + 1] = min(v[n], v[n + 1]), v[n] = larger;
        }
      lists.place[i] = place;
    }
    return lists;
  }

  // Takes the largest value of all lanes out of its list, the one of the lowest expert among equals. If
  // nothing is left, the result is any expert of the last lane, all of which exist.
  FM_DEVICE static u32 take_largest(Lists& lists) {
    u32 head = lists.value[0][0], place = lists.place[0];
    int list = 0;
#pragma unroll
    for (int i = 1; i < Lists::kCount; ++i)
      if (lists.value[i][0] > head) head = lists.value[i][0], place = lists.place[i], list = i;
    const int lane = 31 - __clz(static_cast<int>(__ballot_sync(kAll, head == __reduce_max_sync(kAll, head))));
    place = __shfl_sync(kAll, place, lane);
#pragma unroll
    for (int i = 0; i < Lists::kCount; ++i)
      if (lane_id() == lane && list == i) {
#pragma unroll
        for (int n = 0; n < Lists::kDepth; ++n)
          lists.value[i][n] = n + 1 < Lists::kDepth ? lists.value[i][n + 1] : 0;
        lists.place[i] >>= 8;
      }
    return place_of(lane, place);
  }
  FM_DEVICE static u32 place_of(int lane, u32 j) {
    return __byte_perm(j, static_cast<u32>(lane), 0x7740);  // lane * 256 + j % 256
  }

  // Probabilities of all experts add up to 1 here, whatever the scoring function.
  FM_DEVICE static void add_to(const MoeRouterParams& p, const Token& token, Sums& sums) {
    float total = 1.f;
    if (p.scoring_func != kSoftmax) {
      total = 0.f;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j)
        total += expert(j) < p.experts ? probability(p, token, token.logit[j]) : 0.f;
      total = warp_sum(total) + 1e-20f;
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) sums.probability[j] += probability(p, token, token.logit[j]) / total;
    const float lse = token.top - logf(token.inverse_sum);
    sums.z += lse * lse;
  }
};

// What the router's warps have summed: counts, and the two losses. One block.
//   load balancing: experts * sum_e counts[e] / tokens * mean probability of e (arXiv:2101.03961, eq. 4 to 6)
//   z: mean of logsumexp(logits)^2 (arXiv:2202.08906, equation 5)
// expert_counts[e] is what is kept of the choices of e when it takes at most `capacity`, dropped[e] the rest.
// Overwrites all four.
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
        for (int i = 1; i < kWarps; ++i)
          probability += s_probability[i * 32 + lane], count += s_count[i * 32 + lane];
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
      if (lane == 0)
        *p.load_balancing_loss = static_cast<float>(p.experts) * product, *p.z_loss = z * one_token;
    }
  }
};

// Takes back what an expert cannot hold: assignments that are not among its first `capacity` get id -1 and
// weight 0.
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
