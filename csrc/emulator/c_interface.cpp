// The emulated kernels behind a C interface without torch, for the Python tests: the launchers of
// csrc/cuda/bias_loss_launch.h on ordinary memory.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "../cuda/bias_loss_launch.h"
#include "../cuda/linear_bias_loss_launch.h"
#include "emulator.h"

namespace {

thread_local std::string error;

lnl::Coefficient coefficient(const double* value) {
  lnl::Coefficient result;
  result.present = value != nullptr;
  if (value != nullptr) result.host = *value;
  return result;
}

template <typename Function>
int guarded(Function function) {
  try {
    const int code = function();
    if (code != 0) error = "a launcher returned error " + std::to_string(code);
    return code;
  } catch (const std::exception& fault) {
    error = fault.what();
    return -1;
  }
}

}  // namespace

extern "C" {

// As BiasLossCall; coefficients are null where absent.
struct LnlEmulatedCall {
  int dtype;
  std::int64_t rows, heads, classes, positions;
  int channels_last;
  const void* logits;
  const std::int64_t* labels;
  const void* probabilities;
  int wide_probabilities;
  const void* weight;
  const double* reversal;
  const double* entropy_weight;
  const double* confusion_weight;
  std::int64_t ignore_index;
  double label_smoothing;
  int reduction;
  int mask_entropy;
  void* loss;
  void* cross_entropy;
  void* entropy;
  void* denominators;
  int denominators_given;
  const void* upstream;
  void* gradient;
  void* head_gradient;
};

}  // extern "C"

namespace {

lnl::BiasLossCall call_of(const LnlEmulatedCall& given) {
  using namespace lnl;
  using namespace lnl::cuda;
  BiasLossCall call;
  call.dtype = static_cast<DType>(given.dtype);
  call.rows = given.rows;
  call.heads = given.heads;
  call.classes = given.classes;
  call.positions = given.positions;
  call.channels_last = given.channels_last != 0;
  call.logits = given.logits;
  call.labels = given.labels;
  call.probabilities = given.probabilities;
  call.wide_probabilities = given.wide_probabilities != 0;
  call.weight = given.weight;
  call.reversal = coefficient(given.reversal);
  call.entropy_weight = coefficient(given.entropy_weight);
  call.confusion_weight = coefficient(given.confusion_weight);
  call.ignore_index = given.ignore_index;
  call.label_smoothing = given.label_smoothing;
  call.reduction = static_cast<Reduction>(given.reduction);
  call.mask_entropy = given.mask_entropy != 0;
  call.loss = given.loss;
  call.cross_entropy = given.cross_entropy;
  call.entropy = given.entropy;
  call.denominators = given.denominators;
  call.denominators_given = given.denominators_given != 0;
  call.upstream = given.upstream;
  call.gradient = given.gradient;
  call.head_gradient = given.head_gradient;
  return call;
}

}  // namespace

extern "C" {

const char* lnl_emulated_error() { return error.c_str(); }

void lnl_emulated_schedule(int schedule, std::uint64_t seed) {
  lnl::emulator::settings().schedule = static_cast<lnl::emulator::Schedule>(schedule);
  lnl::emulator::settings().seed = seed;
}

int lnl_emulated_bias_loss(const LnlEmulatedCall* given, int multiprocessors, int shared_memory) {
  using namespace lnl;
  using namespace lnl::cuda;
  const BiasLossCall call = call_of(*given);
  const Device device{multiprocessors, shared_memory};
  lnl::emulator::settings().shared_memory = shared_memory;
  return guarded([&] {
    const std::unique_ptr<void, decltype(&std::free)> workspace(
        std::malloc(launch_facts(call, device).workspace + 1), &std::free);
    return launch_bias_loss(call, device, workspace.get(), nullptr);
  });
}

int lnl_emulated_scale_gradient(void* gradient, std::int64_t elements, int dtype,
                                const void* factor, int factor_dtype, int multiprocessors) {
  using namespace lnl;
  using namespace lnl::cuda;
  Coefficient coefficient;
  coefficient.present = true;
  coefficient.device = factor;
  coefficient.dtype = static_cast<DType>(factor_dtype);
  return guarded([&] {
    return launch_scale_gradient(gradient, elements, static_cast<DType>(dtype), coefficient,
                                 Device{multiprocessors, 48 * 1024}, nullptr);
  });
}

// The kernel that logits of this shape with class labels get.
const char* lnl_emulated_kernel(int dtype, std::int64_t rows, std::int64_t classes,
                                std::int64_t positions) {
  using namespace lnl;
  using namespace lnl::cuda;
  BiasLossCall call;
  call.dtype = static_cast<DType>(dtype);
  call.rows = rows;
  call.classes = classes;
  call.positions = positions;
  const std::int64_t label = 0;
  call.labels = &label;
  return launch_facts(call, Device{132, 227 * 1024}).kernel;
}

// Whether a linear head with gradients for all is one kernel's work, whatever its targets.
int lnl_emulated_linear_fits(int dtype, std::int64_t rows, std::int64_t heads, std::int64_t classes,
                             std::int64_t width, int multiprocessors, int shared_memory) {
  using namespace lnl;
  using namespace lnl::cuda;
  LinearBiasLossCall call;
  call.loss.dtype = static_cast<DType>(dtype);
  call.loss.rows = rows;
  call.loss.heads = heads;
  call.loss.classes = classes;
  call.width = width;
  call.weight_gradient = &call;
  return linear_launch_facts(call, Device{multiprocessors, shared_memory}).on_chip;
}
}
