// What becomes of a rule's options in a step: trust ratios in fp64, operation by operation as in largebatch.rules, so that the bits
// agree.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "passes.h"

namespace largebatch {

// Options of a rule; names as in largebatch.rules.
struct Rule {
  Algorithm algorithm;
  double beta1 = 0, beta2 = 0, eps = 0, momentum = 0, trust_coefficient = 1;
  bool bias_correction = false, bias_correction_in_lr = false;
  bool nesterov = false, lr_in_momentum = true, larc_clip = false, decay_in_ratio = true;
  bool decay_before_norm = false;
  bool damp_ratio_by_momentum = false, skip_zero_norm_layers = false;
  bool has_weight_norm_bounds = false, has_trust_ratio_bounds = false;
  double weight_norm_bounds[2] = {}, trust_ratio_bounds[2] = {};
};

inline int num_directions_of(const Rule& rule) { return rule.algorithm == Algorithm::lans ? 2 : 1; }

// Whether the state is renewed with the norm of the layer's whole gradient.
inline bool normalises_gradients(const Rule& rule) { return rule.algorithm == Algorithm::lans; }

inline double clamped(double value, const double* bounds) {
  return std::min(std::max(value, bounds[0]), bounds[1]);
}

inline double trust_ratio(const Rule& rule, double weight_norm, double direction_norm, double lr,
                          double weight_decay) {
  const bool is_defined = weight_norm > 0 && direction_norm > 0;
  double numerator =
      rule.has_weight_norm_bounds ? clamped(weight_norm, rule.weight_norm_bounds) : weight_norm;
  double denominator = direction_norm;
  if (rule.algorithm == Algorithm::lars2017) {
    const double decayed =
        rule.decay_in_ratio && !rule.decay_before_norm ? weight_decay * weight_norm : 0.0;
    numerator = rule.trust_coefficient * (rule.damp_ratio_by_momentum ? 1.0 - rule.momentum : 1.0) *
                numerator;
    denominator = direction_norm + decayed + rule.eps;
  } else if (rule.algorithm == Algorithm::lars2019) {
    denominator = direction_norm + rule.eps;
  }
  double ratio = numerator / (is_defined ? denominator : 1.0);
  if (rule.has_trust_ratio_bounds) ratio = clamped(ratio, rule.trust_ratio_bounds);
  if (!is_defined) ratio = 1.0;
  if (rule.larc_clip) {
    ratio = ratio < lr ? ratio / lr : 1.0;
    if (rule.skip_zero_norm_layers && !is_defined) ratio = 1.0;
  }
  return ratio;
}

// What all layers of a step have in common. step_size is the bias correction that belongs to the learning rate.
inline Scalars scalars_of(const Rule& rule, double step, double grad_scale) {
  Scalars s{};
  s.grad_scale = grad_scale;
  s.beta1 = rule.beta1, s.beta2 = rule.beta2, s.eps = rule.eps, s.momentum = rule.momentum;
  s.is_nesterov = rule.nesterov;
  s.shrinkage = 1.0, s.step_size = 1.0, s.grad_norm = 1.0;
  s.m_in_m_hat = 1.0, s.v_in_v_hat = 1.0;
  if (rule.algorithm == Algorithm::lamb || rule.algorithm == Algorithm::lans) {
    const double rest1 = 1.0 - std::pow(rule.beta1, step), rest2 = 1.0 - std::pow(rule.beta2, step);
    if (rule.bias_correction) s.m_in_m_hat = 1.0 / rest1, s.v_in_v_hat = 1.0 / rest2;
    if (rule.bias_correction_in_lr) s.step_size = std::sqrt(rest2) / rest1;
  } else if (rule.algorithm == Algorithm::nlamb || rule.algorithm == Algorithm::nnlamb) {
    s.m_in_m_hat = rule.beta1 / (1.0 - std::pow(rule.beta1, step + 1));
    s.grad_in_m_hat = (1.0 - rule.beta1) / (1.0 - std::pow(rule.beta1, step));
    const bool looks_ahead = rule.algorithm == Algorithm::nnlamb;
    s.v_in_v_hat = rule.beta2 / (1.0 - std::pow(rule.beta2, looks_ahead ? step + 1 : step));
    s.grad_in_v_hat = looks_ahead ? (1.0 - rule.beta2) / (1.0 - std::pow(rule.beta2, step)) : 0.0;
  }
  return s;
}

// Of a layer and a step; see largebatch.kernels.rounding.
inline uint32_t rounding_key(uint32_t seed, double step) {
  uint32_t x = seed + static_cast<uint32_t>(static_cast<int64_t>(step));
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ x >> 16;
}

// Rounded in the compute type, as the product of two tensors is.
inline double local_lr(bool is_fp64, double lr, double ratio) {
  return is_fp64 ? lr * ratio : static_cast<float>(lr) * static_cast<float>(ratio);
}

// Puts a layer's ratios in force, as many as its rule has directions.
inline void set_ratios(Scalars& s, const Rule& rule, bool is_fp64, double lr, const double* ratios,
                       double weight_decay, double shrinkage) {
  const double ratio = ratios[0];
  s.weight_decay = weight_decay;
  s.shrinkage = shrinkage;
  if (rule.algorithm == Algorithm::lans) {
    s.step_size = local_lr(is_fp64, lr, local_lr(is_fp64, rule.beta1, ratio));
    s.gradient_step_size = local_lr(is_fp64, lr, local_lr(is_fp64, 1.0 - rule.beta1, ratios[1]));
  } else {
    s.step_size = local_lr(is_fp64, lr * s.step_size, ratio);
  }
  s.inside = rule.lr_in_momentum ? local_lr(is_fp64, lr, ratio) : ratio;
  s.outside = rule.lr_in_momentum ? 1.0 : lr;
}

}  // namespace largebatch
