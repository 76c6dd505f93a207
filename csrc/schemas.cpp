// The operators' schemas. Coefficients are 0-dim tensors: torch.compile would compile again for
// every value of a float.
#include <torch/csrc/stable/library.h>

#define LNL_LOSS_ARGUMENTS                                                                      \
  "Tensor target, Tensor? weight, Tensor? denominators, Tensor? reversal, "                     \
  "Tensor? entropy_weight, Tensor? confusion_weight, int ignore_index, float label_smoothing, " \
  "int reduction, bool mask_entropy, int heads, "
#define LNL_VALUES "Tensor loss, Tensor cross_entropy, Tensor entropy, Tensor denominators, "
#define LNL_LINEAR_INPUTS "Tensor features, Tensor head_weight, Tensor? head_bias, "
#define LNL_LINEAR_GRADIENTS \
  "Tensor features_gradient, Tensor weight_gradient, Tensor bias_gradient"

STABLE_TORCH_LIBRARY(lnl_ext, m) {
  m.def("bias_loss(Tensor logits, " LNL_LOSS_ARGUMENTS
        "bool logits_gradient, bool head_gradient) -> (" LNL_VALUES
        "Tensor gradient, Tensor head_gradient)");
  m.def("bias_loss_backward(Tensor grad_loss, Tensor logits, " LNL_LOSS_ARGUMENTS
        "bool logits_gradient, bool head_gradient) -> (Tensor gradient, Tensor head_gradient)");
  m.def("linear_bias_loss(" LNL_LINEAR_INPUTS LNL_LOSS_ARGUMENTS
        "bool features_gradient, bool head_gradient) -> (" LNL_VALUES LNL_LINEAR_GRADIENTS ")");
  m.def("linear_bias_loss_backward(Tensor grad_loss, " LNL_LINEAR_INPUTS LNL_LOSS_ARGUMENTS
        "bool features_gradient, bool head_gradient) -> (" LNL_LINEAR_GRADIENTS ")");
  m.def("scale_gradient_(Tensor(a!) gradient, Tensor factor) -> ()");
}
