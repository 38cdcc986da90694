// The options of a rule as Python gives them.
#pragma once

#include <torch/extension.h>

#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "rule.h"

namespace largebatch {

namespace py = pybind11;

// Reads options by their names in largebatch.rules, each of them, and no others.
class OptionReader {
 public:
  explicit OptionReader(const py::dict& options) : options_(options) {}

  template <class T> void read(const char* name, T& value) { value = take(name).cast<T>(); }

  void read_bounds(const char* name, bool& has, double* values) {
    const py::object given = take(name);
    if (given.is_none()) return;
    has = true;
    std::tie(values[0], values[1]) = given.cast<std::pair<double, double>>();
  }

  py::object take(const char* name) {
    if (!options_.contains(name))
      throw py::key_error(std::string("the compiled kernels miss the option ") + name);
    taken_.insert(name);
    return options_[name];
  }

  void check_that_all_are_taken() const {
    for (const auto& [name, value] : options_)
      if (taken_.count(name.cast<std::string>()) == 0)
        throw py::key_error("the compiled kernels do not know the option " +
                            name.cast<std::string>());
  }

 private:
  const py::dict& options_;
  std::set<std::string> taken_;
};

inline Algorithm algorithm_of(const std::string& name) {
  if (name == "lars") return Algorithm::lars2017;
  if (name == "lars2019") return Algorithm::lars2019;
  if (name == "lamb") return Algorithm::lamb;
  if (name == "nlamb") return Algorithm::nlamb;
  if (name == "nnlamb") return Algorithm::nnlamb;
  if (name == "lans") return Algorithm::lans;
  throw py::key_error("the compiled kernels have no formulas for " + name);
}

inline Rule rule_of(const std::string& name, const py::dict& options) {
  Rule rule{};
  OptionReader reader(options);
  rule.algorithm = algorithm_of(name);
  reader.read("eps", rule.eps);
  reader.read_bounds("weight_norm_bounds", rule.has_weight_norm_bounds, rule.weight_norm_bounds);
  reader.read_bounds("trust_ratio_bounds", rule.has_trust_ratio_bounds, rule.trust_ratio_bounds);
  if (rule.algorithm >= Algorithm::lamb) {
    std::tie(rule.beta1, rule.beta2) = reader.take("betas").cast<std::pair<double, double>>();
    const py::object correction =
        rule.algorithm == Algorithm::lans ? py::bool_(true) : reader.take("bias_correction");
    rule.bias_correction_in_lr = py::isinstance<py::str>(correction);  // "lr"
    rule.bias_correction = !rule.bias_correction_in_lr && correction.cast<bool>();
  } else {
    reader.read("momentum", rule.momentum);
  }
  if (rule.algorithm == Algorithm::lars2017) {
    reader.read("trust_coefficient", rule.trust_coefficient);
    reader.read("nesterov", rule.nesterov);
    reader.read("lr_in_momentum", rule.lr_in_momentum);
    reader.read("larc_clip", rule.larc_clip);
    reader.read("decay_in_ratio", rule.decay_in_ratio);
    reader.read("decay_before_norm", rule.decay_before_norm);
    reader.read("damp_ratio_by_momentum", rule.damp_ratio_by_momentum);
    reader.read("skip_zero_norm_layers", rule.skip_zero_norm_layers);
  }
  reader.check_that_all_are_taken();
  return rule;
}

}  // namespace largebatch
