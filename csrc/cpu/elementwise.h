// What is done to whole arrays without the kernels: checking and counting targets, scaling a
// gradient. Included like simd.h: inside each instruction set's namespace.

template <typename W>
double sum_of_weights(const int64_t* target, int64_t count, int64_t stride, int64_t ignore_index,
                      const W* weight) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t value = target[i * stride];
    if (value != ignore_index) {
      sum += static_cast<double>(weight[value]);
    }
  }
  return sum;
}

TargetCount count_targets(const int64_t* target, int64_t count, int64_t stride,
                          int64_t ignore_index, int64_t classes, const void* weight,
                          bool weight_is_double) {
  int64_t outside = 0;
  int64_t counted = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t value = target[i * stride];
    const int64_t is_counted = value != ignore_index;
    const int64_t in_range = (value >= 0) & (value < classes);
    counted += is_counted;
    outside |= is_counted & (in_range ^ 1);
  }
  TargetCount result;
  result.counted = counted;
  result.in_range = outside == 0;
  result.weight = static_cast<double>(counted);
  if (weight != nullptr && result.in_range) {
    result.weight = weight_is_double ? sum_of_weights(target, count, stride, ignore_index,
                                                      static_cast<const double*>(weight))
                                     : sum_of_weights(target, count, stride, ignore_index,
                                                      static_cast<const float*>(weight));
  }
  return result;
}

template <DType D>
void scale_values(void* gradient, int64_t begin, int64_t end, double factor) {
  using T = typename Storage<D>::compute;
  constexpr int64_t kChunk = 512;
  T chunk[kChunk];
  auto* const values = static_cast<typename Storage<D>::type*>(gradient);
  const T multiplier = static_cast<T>(factor);
  for (int64_t i = begin; i < end; i += kChunk) {
    const int64_t count = i + kChunk < end ? kChunk : end - i;
    read_values<D>(values + i, count, chunk);
    for (int64_t j = 0; j < count; ++j) {
      chunk[j] *= multiplier;
    }
    write_values<D>(chunk, count, values + i);
  }
}

void scale_units(void* gradient, int64_t begin, int64_t end, DType dtype, double factor) {
  switch (dtype) {
    case DType::kFloat32:
      return scale_values<DType::kFloat32>(gradient, begin, end, factor);
    case DType::kFloat64:
      return scale_values<DType::kFloat64>(gradient, begin, end, factor);
    case DType::kFloat16:
      return scale_values<DType::kFloat16>(gradient, begin, end, factor);
    case DType::kBFloat16:
      return scale_values<DType::kBFloat16>(gradient, begin, end, factor);
  }
}
