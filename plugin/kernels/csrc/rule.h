// The options of a rule as Python gives them, and what becomes of them in a step, as in largebatch.rules.
#pragma once

#include <torch/extension.h>

#include <cmath>
#include <utility>

#include "passes.h"
#include "trust_ratio.h"

namespace largebatch {

inline Rule rule_of(const py::dict& options) {
  Rule rule{};
  auto number = [&](const char* name, double otherwise) {
    return options.contains(name) ? options[name].cast<double>() : otherwise;
  };
  auto truth = [&](const char* name, bool otherwise) {
    return options.contains(name) ? options[name].cast<bool>() : otherwise;
  };
  auto bounds = [&](const char* name, bool& has, double* values) {
    if (!options.contains(name) || options[name].is_none()) return;
    const auto pair = options[name].cast<std::pair<double, double>>();
    has = true;
    values[0] = pair.first;
    values[1] = pair.second;
  };
  rule.algorithm = static_cast<Algorithm>(options["algorithm"].cast<int>());
  rule.beta1 = number("beta1", 0), rule.beta2 = number("beta2", 0), rule.eps = number("eps", 0);
  rule.momentum = number("momentum", 0), rule.trust_coefficient = number("trust_coefficient", 1);
  rule.bias_correction = truth("bias_correction", false);
  rule.bias_correction_in_lr = truth("bias_correction_in_lr", false);
  rule.nesterov = truth("nesterov", false), rule.lr_in_momentum = truth("lr_in_momentum", true);
  rule.larc_clip = truth("larc_clip", false), rule.decay_in_ratio = truth("decay_in_ratio", true);
  rule.damp_ratio_by_momentum = truth("damp_ratio_by_momentum", false);
  rule.skip_zero_norm_layers = truth("skip_zero_norm_layers", false);
  bounds("weight_norm_bounds", rule.has_weight_norm_bounds, rule.weight_norm_bounds);
  bounds("trust_ratio_bounds", rule.has_trust_ratio_bounds, rule.trust_ratio_bounds);
  return rule;
}

// What all layers of a step have in common. step_size is the bias correction that belongs to the learning rate.
inline Scalars scalars_of(const Rule& rule, double step, double grad_scale) {
  Scalars s{};
  s.grad_scale = grad_scale;
  s.beta1 = rule.beta1, s.beta2 = rule.beta2, s.eps = rule.eps, s.momentum = rule.momentum;
  s.is_nesterov = rule.nesterov;
  s.shrinkage = 1.0, s.step_size = 1.0;
  s.m_in_m_hat = 1.0, s.v_in_v_hat = 1.0;
  if (rule.algorithm == Algorithm::lamb) {
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

// Puts a layer's ratio in force.
inline void set_ratio(Scalars& s, const Rule& rule, bool is_fp64, double lr, double ratio, double weight_decay,
                      double shrinkage) {
  s.weight_decay = weight_decay;
  s.shrinkage = shrinkage;
  s.step_size = local_lr(is_fp64, lr * s.step_size, ratio);
  s.inside = rule.lr_in_momentum ? local_lr(is_fp64, lr, ratio) : ratio;
  s.outside = rule.lr_in_momentum ? 1.0 : lr;
}

}  // namespace largebatch
