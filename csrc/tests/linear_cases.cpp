// The list of linear cases: every dtype with every option, the edges of rows, columns and width,
// every plan of the launcher, and chunks.
#include "linear_case.h"

namespace lnl::tests {

namespace {

struct Shape {
  std::int64_t rows, heads, classes, width;
};

std::vector<LinearCase> option_sets() {
  std::vector<LinearCase> sets;
  const auto add = [&](auto change) {
    LinearCase c;
    change(c, c.loss);
    sets.push_back(c);
  };
  add([](LinearCase&, Case&) {});
  add([](LinearCase&, Case& c) { c.entropy_weight = 0.3, c.reversal = 0.7; });
  add([](LinearCase& l, Case& c) {
    c.entropy_weight = 0.2, c.weighted = true, c.ignored = 0.3, c.mask_entropy = true;
    l.bias = false;
  });
  add([](LinearCase&, Case& c) {
    c.reduction = Reduction::kSum, c.entropy_weight = 0.1, c.reversal = 0.5;
    c.coefficients_on_device = true, c.ignored = 0.2, c.head_gradient = false;
  });
  add([](LinearCase&, Case& c) {
    c.reduction = Reduction::kNone, c.entropy_weight = 0.4, c.separate_backward = true;
    c.weighted = true, c.ignored = 0.2, c.reversal = 0.3;
  });
  add([](LinearCase& l, Case& c) {
    c.smoothing = 0.1, c.weighted = true, c.entropy_weight = 0.3, c.reversal = 0.6;
    c.ignored = 0.3, l.unaligned = true;
  });
  add([](LinearCase&, Case& c) {
    c.target = Target::kProbabilities, c.entropy_weight = 0.2, c.separate_backward = true;
  });
  add([](LinearCase& l, Case& c) {
    c.target = Target::kWideProbabilities, c.weighted = true, c.smoothing = 0.2;
    c.reduction = Reduction::kNone, c.entropy_weight = 0.2, c.gradient = c.head_gradient = false;
    l.bias = false;
  });
  add([](LinearCase&, Case& c) {
    c.confusion_weight = 0.5, c.reversal = 0.0, c.entropy_weight = 0.0, c.ignored = 0.2;
    c.mask_entropy = true, c.separate_backward = true;
  });
  add([](LinearCase&, Case& c) {
    c.confusion_weight = 0.5, c.entropy_weight = 0.3, c.reduction = Reduction::kSum;
    c.target = Target::kProbabilities, c.gradient = false;
  });
  add([](LinearCase&, Case& c) { c.gradient = c.head_gradient = false, c.entropy_weight = 0.2; });
  return sets;
}

// 32 rows a tile, of which the last one is whole, cut within a group, or of one row.
const Shape kShapes[] = {
    {1, 1, 2, 1},   {5, 1, 2, 8},   {32, 1, 3, 24},   {33, 1, 12, 40}, {70, 1, 7, 33},
    {64, 3, 4, 20}, {45, 2, 5, 16}, {40, 1, 17, 12},  {37, 1, 64, 28}, {66, 8, 8, 9},
    {35, 16, 3, 8}, {9, 64, 1, 12}, {34, 1, 16, 264}, {0, 1, 5, 8},    {0, 2, 3, 8},
};

}  // namespace

std::vector<LinearCase> all_linear_cases() {
  std::vector<LinearCase> cases;
  const std::vector<LinearCase> options = option_sets();
  const DType dtypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
  std::size_t turn = 0;
  const auto add = [&](LinearCase c, const Shape& shape, DType dtype) {
    c.loss.rows = shape.rows, c.loss.heads = shape.heads, c.loss.classes = shape.classes;
    c.width = shape.width;
    c.loss.dtype = dtype;
    c.loss.seed = cases.size() + 1;
    c.loss.few_blocks = c.loss.seed % 2 == 0;
    cases.push_back(c);
  };
  for (const Shape& shape : kShapes) {
    for (const DType dtype : dtypes) {
      for (std::size_t i = turn++ % 3; i < options.size(); i += 3) add(options[i], shape, dtype);
    }
  }
  for (const DType dtype : dtypes) {
    // Every option once on one shape of several tiles.
    for (const LinearCase& c : options) add(c, {75, 1, 12, 24}, dtype);
    // Little shared memory: 16, 8 and 4 rows a tile, with several warps for a group of rows.
    for (const int shared : {62, 54, 48, 42, 38, 34, 31}) {
      LinearCase c = options[turn++ % options.size()];
      c.loss.shared_memory = shared * 1024;
      const std::int64_t narrow = dtype == DType::kFloat64 ? 2 : 1;
      add(c, {21, 1, 12, 140 / narrow}, dtype);
      c.loss.few_blocks = true;
      add(c, {21, 2, 3, 200 / narrow}, dtype);
    }
    LinearCase c = options[1];
    c.not_a_number = true;
    add(c, {37, 1, 6, 16}, dtype);
    // Sites to which no term gives a gradient; NaN features still meet the weights' zeros.
    c.loss.ignored = 1.1, c.loss.reduction = Reduction::kSum, c.loss.entropy_weight = 0.0;
    add(c, {37, 1, 6, 16}, dtype);
    c = options[1];
    c.loss.out_of_range = true;
    add(c, {37, 1, 6, 16}, dtype);
    c.loss.smoothing = 0.1;
    add(c, {37, 1, 6, 16}, dtype);
    c = options[2];
    c.loss.ignored = 1.1, c.loss.mask_entropy = false;
    add(c, {37, 1, 6, 16}, dtype);
  }
  // Labels that more blocks count than a warp has lanes.
  LinearCase many = options[1];
  many.loss.gradient = many.loss.head_gradient = false;
  many.loss.many_blocks = true;
  many.loss.reduction = Reduction::kMean;
  add(many, {33'500, 1, 2, 1}, DType::kFloat32);
  cases.back().loss.few_blocks = false;
  // Chunks, whose logits the test multiplies; rows of every kernel that reads them.
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    for (const Shape& shape :
         {Shape{21, 1, 12, 16}, {21, 3, 5, 8}, {13, 1, 100, 8}, {7, 1, 1100, 4}, {0, 1, 70, 4}}) {
      for (std::size_t i = turn++ % 2; i < options.size(); i += 2) {
        LinearCase c = options[i];
        if (c.loss.target == Target::kProbabilities) c.loss.target = Target::kWideProbabilities;
        c.chunk = 4;
        add(c, shape, dtype);
        if (shape.classes < 1024) continue;
        c.loss.shared_memory = 4 * 1024;  // the logits are read twice
        add(c, shape, dtype);
      }
    }
  }
  return cases;
}

}  // namespace lnl::tests
