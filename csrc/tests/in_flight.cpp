// in_flight MULTIPROCESSORS SHARED_MEMORY: what the launchers say of calls that move more than
// 32 MiB, a line each: the kernel's instance, a block's threads, shared memory and bytes in flight,
// whether logits are read once, and the call. benchmarks/cuda_static.py multiplies them with the
// blocks of a multiprocessor.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "../cuda/bias_loss_launchers.cuh"

namespace {

using namespace lnl;
using namespace lnl::cuda;

template <typename T>
void print(const char* type, const Device& device, std::int64_t classes, std::int64_t positions,
           bool dense) {
  const std::int64_t label = 0;
  BiasLossCall call;
  call.labels = &label;
  call.label_smoothing = dense ? 0.1 : 0.0;
  call.classes = classes, call.positions = positions;
  call.channels_last = positions == 1;
  call.rows = (std::int64_t{64} << 20) / (classes * positions * sizeof(T)) + 1;
  const Plan plan = make_plan<T>(call, device);
  std::string instance = std::string(facts_of(plan).kernel) + "<" + type;
  instance += plan.dense ? ", true" : ", false";
  if (plan.kernel == Kernel::kRowsMedium16) instance += ", 16";
  if (plan.kernel == Kernel::kRowsMedium32) instance += ", 32";
  if (plan.for_sites()) {
    instance += ", " + std::to_string(plan.sites) + (plan.vector ? ", true" : ", false");
  }
  std::printf("%s>\t%d\t%zu\t%lld\t%d\tC = %lld, S = %lld\n", instance.c_str(), plan.threads,
              plan.shared, static_cast<long long>(plan.in_flight), facts_of(plan).reads_logits_once,
              static_cast<long long>(classes), static_cast<long long>(positions));
}

template <typename T>
void print_all(const char* type, const Device& device) {
  for (const bool dense : {false, true}) {
    for (const std::int64_t classes :
         {8, 12, 32, 40, 64, 65, 100, 257, 500, 1000, 1100, 4099, 32000, 128256}) {
      print<T>(type, device, classes, 1, dense);
    }
    // 128 bits of sites, 64, and one by one.
    for (const std::int64_t positions : {4096, 196, 225}) {
      for (const std::int64_t classes : {8, 12, 32, 64, 150, 1000, 4000}) {
        print<T>(type, device, classes, positions, dense);
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const Device device{std::atoi(arguments[1]), std::atoi(arguments[2])};
  print_all<float>("float", device);
  print_all<double>("double", device);
  print_all<__half>("__half", device);
  print_all<__nv_bfloat16>("__nv_bfloat16", device);
}
