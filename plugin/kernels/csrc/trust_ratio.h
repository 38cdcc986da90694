// Trust ratio of one layer in fp64, operation by operation as in largebatch.rules, so that the bits agree.
#pragma once

#include <algorithm>
#include <cmath>

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

inline double clamped(double value, const double* bounds) { return std::min(std::max(value, bounds[0]), bounds[1]); }

inline double trust_ratio(const Rule& rule, double weight_norm, double direction_norm, double lr, double weight_decay) {
  const bool is_defined = weight_norm > 0 && direction_norm > 0;
  double numerator = rule.has_weight_norm_bounds ? clamped(weight_norm, rule.weight_norm_bounds) : weight_norm;
  double denominator = direction_norm;
  if (rule.algorithm == Algorithm::lars2017) {
    const double decayed = rule.decay_in_ratio && !rule.decay_before_norm ? weight_decay * weight_norm : 0.0;
    numerator = rule.trust_coefficient * (rule.damp_ratio_by_momentum ? 1.0 - rule.momentum : 1.0) * numerator;
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

}  // namespace largebatch
