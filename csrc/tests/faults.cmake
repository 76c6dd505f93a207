# Faults put into copies of the kernels, one at a time; each must be caught, and for the right reason.
# A fault whose place is no longer in the source, or is there twice, stops the configuration.

file(GLOB LNL_KERNEL_HEADERS CONFIGURE_DEPENDS ${LNL_CSRC}/cuda/*.cuh ${LNL_CSRC}/cuda/*.h)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${LNL_KERNEL_HEADERS})

# A copy of the kernels in FOLDER, with FIND in FILE replaced.
function(lnl_faulty_copy name folder file find replace)
  foreach(header IN LISTS LNL_KERNEL_HEADERS)
    get_filename_component(base ${header} NAME)
    file(READ ${header} text)
    if(base STREQUAL file)
      string(FIND "${text}" "${find}" first)
      string(FIND "${text}" "${find}" last REVERSE)
      if(first EQUAL -1 OR NOT first EQUAL last)
        message(FATAL_ERROR "fault ${name}: its place is not in ${file} exactly once")
      endif()
      string(REPLACE "${find}" "${replace}" text "${text}")
    endif()
    file(CONFIGURE OUTPUT ${folder}/${base} CONTENT "${text}" @ONLY)
  endforeach()
endfunction()

# The mains of the tests, which see nothing of the kernels and so are the same for all faults.
foreach(main fault_test linear_fault_test large_test)
  add_library(lnl_${main} OBJECT ${main}.cpp)
  target_include_directories(lnl_${main} BEFORE PRIVATE ${LNL_CSRC}/emulator/include
                                                        ${LNL_CSRC}/emulator)
  target_compile_options(lnl_${main} PRIVATE ${LNL_TEST_FLAGS})
  target_compile_definitions(lnl_${main} PRIVATE LNL_EMULATOR_HOOKS)
endforeach()

# The test of one fault: further SOURCES are compiled against its copy of the kernels; MAIN is run with
# ARGUMENTS.
function(lnl_fault_test name folder expected main arguments)
  add_executable(fault_${name} ${ARGN})
  target_include_directories(fault_${name} BEFORE PRIVATE ${folder} ${LNL_CSRC}/emulator/include
                                                          ${LNL_CSRC}/emulator)
  target_compile_options(fault_${name} PRIVATE ${LNL_TEST_FLAGS})
  target_link_libraries(fault_${name} PRIVATE ${main} lnl_case lnl_hooks)
  add_test(NAME fault.${name} COMMAND fault_${name} ${arguments})
  set_tests_properties(fault.${name} PROPERTIES PASS_REGULAR_EXPRESSION "${expected}")
endfunction()
set_source_files_properties(fault_kernels.cpp linear_fault_kernels.cpp PROPERTIES COMPILE_OPTIONS "-Og;-fsanitize=thread")

# lnl_fault(NAME FILE FIND REPLACE EXPECTED): EXPECTED is a regular expression of what is reported.
function(lnl_fault name file find replace expected)
  lnl_kernel_fault(lnl_fault_test "" ${name} ${file} "${find}" "${replace}" "${expected}")
endfunction()

# lnl_bulk_fault: likewise, for rows that are staged by bulk copies.
function(lnl_bulk_fault name file find replace expected)
  lnl_kernel_fault(lnl_fault_test "bulk-copies" ${name} ${file} "${find}" "${replace}" "${expected}")
endfunction()

# lnl_large_fault: likewise, for tensors of more than 2^31 elements.
function(lnl_large_fault name file find replace expected)
  lnl_kernel_fault(lnl_large_test "float32" ${name} ${file} "${find}" "${replace}" "${expected}")
endfunction()

function(lnl_kernel_fault main arguments name file find replace expected)
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/faults/${name})
  lnl_faulty_copy(${name} ${folder} ${file} "${find}" "${replace}")
  lnl_fault_test(${name} ${folder} "${expected}" ${main} "${arguments}" fault_kernels.cpp)
endfunction()

# lnl_linear_fault: likewise, for the linear head's cases.
function(lnl_linear_fault name file find replace expected)
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/faults/${name})
  lnl_faulty_copy(${name} ${folder} ${file} "${find}" "${replace}")
  lnl_fault_test(${name} ${folder} "${expected}" lnl_linear_fault_test "" fault_kernels.cpp
    linear_fault_kernels.cpp)
  target_link_libraries(fault_${name} PRIVATE lnl_linear_case)
endfunction()

lnl_fault(missing_syncthreads_before_read bias_loss_large.cuh
  "if (lane == 0) by_warp[warp] = online;
    __syncthreads();"
  "if (lane == 0) by_warp[warp] = online;"
  "race: |never written")
lnl_fault(missing_syncthreads_before_reuse bias_loss_large.cuh
  "__syncthreads();  // the next row overwrites by_warp and the label's logit"
  ""
  "race: ")
lnl_fault(label_read_after_the_gradient_in_its_place bias_loss_large.cuh
  "const A label_logit = wants_logit ? *logit_of_label : A(0);"
  "const A label_logit = wants_logit ? widen(problem.logits[begin + label_class]) : A(0);"
  "race: .* of logits")
# The groups of asynchronous copies of a row.
lnl_fault(missing_wait_for_a_copy bias_loss_row_stream.cuh
  "__pipeline_wait_prior(behind);"
  "static_cast<void>(behind);"
  "asynchronous copy is under way: .* of shared memory")
lnl_fault(wait_for_the_group_before bias_loss_large.cuh
  "stream.wait(slot, stays ? problem.slots - 1 - group : problem.slots - 1);"
  "stream.wait(slot, stays ? problem.slots - group : problem.slots - 1);"
  "asynchronous copy is under way: .* of shared memory")
lnl_fault(missing_wait_for_a_second_copy bias_loss_large.cuh
  "if (!stays) stream.wait(slot, problem.slots - 1);"
  ""
  "asynchronous copy is under way: .* of shared memory")
lnl_fault(place_refilled_before_it_is_read bias_loss_large.cuh
  "for (int group = 0; wants_gradient && group < problem.groups; ++group) {"
  "for (int group = 0; wants_gradient && group < problem.groups; ++group) {
      if (stays) stream.copy(slot);"
  "asynchronous copy is under way: .* of shared memory")
lnl_fault(label_read_from_where_the_next_row_arrives bias_loss_large.cuh
  "const A label_logit = wants_logit ? *logit_of_label : A(0);"
  "const A label_logit = !wants_logit ? A(0) : stays && problem.groups > 1 ? widen(stage[label_class + before]) : *logit_of_label;"
  "race: .* of shared memory|asynchronous copy is under way: .* of shared memory")
# Likewise where they are copied in bulk.
lnl_bulk_fault(bulk_missing_wait bias_loss_row_stream.cuh
  "wait_for_copy(barriers_ + slot, parity_);"
  ""
  "asynchronous copy is under way: .* of shared memory")
lnl_bulk_fault(bulk_missing_wait_for_a_second_copy bias_loss_large.cuh
  "if (!stays) stream.wait(slot, problem.slots - 1);"
  ""
  "asynchronous copy is under way: .* of shared memory")
lnl_bulk_fault(bulk_wait_by_one_lane bias_loss_row_stream.cuh
  "wait_for_copy(barriers_ + slot, parity_);"
  "if (threadIdx.x % kWarp == 0) wait_for_copy(barriers_ + slot, parity_);"
  "race: .* of shared memory")
lnl_bulk_fault(bulk_wait_for_another_slot bias_loss_row_stream.cuh
  "wait_for_copy(barriers_ + slot, parity_);"
  "wait_for_copy(barriers_ + (slot + problem_.slots - 1) % problem_.slots, parity_);"
  "asynchronous copy is under way: .* of shared memory|never complete")
lnl_bulk_fault(bulk_wait_for_the_phase_before bias_loss_row_stream.cuh
  "wait_for_copy(barriers_ + slot, parity_);"
  "wait_for_copy(barriers_ + slot, parity_ ^ 1);"
  "asynchronous copy is under way: .* of shared memory")
lnl_bulk_fault(bulk_phase_not_advanced bias_loss_row_stream.cuh
  "if (slot + 1 == problem_.slots) parity_ ^= 1;"
  ""
  "asynchronous copy is under way: .* of shared memory")
lnl_bulk_fault(bulk_place_refilled_before_all_have_read bias_loss_row_stream.cuh
  "__syncwarp();  // the warp has read what is there, and knows its barriers"
  "if (row_ == blockIdx.x) __syncwarp();"
  "asynchronous copy is under way: .* of shared memory|race: .* of shared memory")
lnl_bulk_fault(bulk_barriers_used_before_they_have_begun bias_loss_row_stream.cuh
  "__syncwarp();  // the warp has read what is there, and knows its barriers"
  ""
  "race: read of another thread's store: .* of shared memory|not a barrier")
lnl_bulk_fault(bulk_place_refilled_before_it_is_read bias_loss_large.cuh
  "for (int group = 0; wants_gradient && group < problem.groups; ++group) {"
  "for (int group = 0; wants_gradient && group < problem.groups; ++group) {
      if (stays) stream.copy(slot);"
  "asynchronous copy is under way: .* of shared memory|all of them")
lnl_bulk_fault(bulk_more_bytes_expected_than_copied bulk_copy.cuh
  "barrier,
                                 bytes);"
  "barrier,
                                 bytes + 16);"
  "never complete: 0 arrivals")
lnl_bulk_fault(bulk_fewer_bytes_expected_than_copied bulk_copy.cuh
  "barrier,
                                 bytes);"
  "barrier,
                                 bytes > 16 ? bytes - 16 : bytes);"
  "never complete: 0 arrivals")
lnl_bulk_fault(bulk_missing_arrival bulk_copy.cuh
  "ptx::mbarrier_arrive_expect_tx("
  "if (bytes > 0) ptx::mbarrier_arrive_expect_tx("
  "never complete: 1 arrivals")
lnl_bulk_fault(bulk_one_window_not_copied bias_loss_row_stream.cuh
  "(end - begin) * 16 : 0"
  "(end - begin - 1) * 16 : 0"
  "never written: .* of shared memory")
lnl_bulk_fault(bulk_copy_of_what_is_not_whole bias_loss_row_stream.cuh
  "end = own.end < last ? own.end : last;"
  "end = own.end;"
  "asynchronous copy is under way: .* of shared memory|out of bounds")
lnl_bulk_fault(bulk_store_not_fenced bias_loss_row_stream.cuh
  "place(slot, group_, window));
    order_stores_before_copies();"
  "place(slot, group_, window));"
  "store is not fenced: .* of shared memory")
lnl_bulk_fault(bulk_stores_of_begin_turn_not_fenced bias_loss_row_stream.cuh
  "if (begins) order_stores_before_copies();  // those of begin_turn as well"
  ""
  "store is not fenced: .* of shared memory")
lnl_bulk_fault(bulk_barriers_in_the_stage bias_loss_large.cuh
  "kRowsLargeSums<T, kDense> + kLargeThreads / kWarp * kSlots * sizeof(BulkBarrier);"
  "kRowsLargeSums<T, kDense>;"
  "one that was stored over|(race: two stores|asynchronous copy is under way): .* of shared memory")
lnl_fault(missing_wait_for_a_tile bias_loss_rows.cuh
  "__pipeline_wait_prior(problem_.ahead - 1);"
  ""
  "asynchronous copy is under way: .* of shared memory")
# A lane reads of a tile what it has copied itself, which saves a barrier.
lnl_fault(tile_copied_in_by_other_lanes bias_loss_rows.cuh
  "int c = threadIdx.x % kWarp * kWide<T>; c < count"
  "int c = (kWarp - 1 - threadIdx.x % kWarp) * kWide<T>; c < count"
  "asynchronous copy is under way: .* of shared memory|never written: .* of shared memory")
lnl_fault(wait_for_the_row_before bias_loss_rows.cuh
  "__pipeline_wait_prior(kAhead - 1);"
  "__pipeline_wait_prior(kAhead);"
  "asynchronous copy is under way: .* of shared memory")
lnl_fault(wait_for_the_column_before bias_loss_sites.cuh
  "__pipeline_wait_prior(problem.ahead - 1);"
  "__pipeline_wait_prior(problem.ahead);"
  "asynchronous copy is under way: .* of shared memory")
lnl_fault(missing_wait_for_the_copies_of_a_tile_of_sites bias_loss_large.cuh
  "if (copies) __pipeline_wait_prior(problem.ahead - 1);"
  ""
  "asynchronous copy is under way: .* of shared memory")
lnl_fault(missing_syncthreads_before_finish bias_loss_large.cuh
  "__syncthreads();
    if (threadIdx.x < kTile) {"
  "if (threadIdx.x < kTile) {"
  "race: |never written")
lnl_fault(missing_syncthreads_before_factors bias_loss_large.cuh
  "__syncthreads();
    if (!sites.is_here(0)) continue;  // nor will it be"
  "if (!sites.is_here(0)) continue;  // nor will it be"
  "race: |never written")
lnl_fault(misaligned_labels bias_loss_launchers.cuh
  "problem.wide_labels = aligned(call.labels, 16);"
  "problem.wide_labels = true;"
  "misaligned access")
lnl_fault(missing_syncwarp_before_read bias_loss_rows.cuh
  "__syncwarp();
  stream.copy();"
  "stream.copy();"
  "race: |never written")
lnl_fault(missing_syncwarp_before_copy bias_loss_rows.cuh
  "__syncwarp();
  if (problem.gradient != nullptr) {"
  "if (problem.gradient != nullptr) {"
  "race: |never written")
# The copies in and out deal a tile to the lanes alike, which saves the barrier between them.
lnl_fault(tile_copied_out_by_other_lanes bias_loss_rows.cuh
  "for (int window = lane; window < windows; window += kWarp)"
  "for (int window = kWarp - 1 - lane; window < windows; window += kWarp)"
  "race: .* of shared memory")
lnl_fault(out_of_bounds_by_one bias_loss_math.cuh
  "const bool inside = element >= 0 && element < count;"
  "const bool inside = element >= 0 && element <= count;"
  "out of bounds")
lnl_fault(misaligned_vector bias_loss_plan.cuh
  "call.positions % count == 0 && aligned(call.logits, bytes)"
  "call.positions > 0 && aligned(call.logits, 1)"
  "misaligned access")
lnl_fault(alignment_of_the_other_gradient_in_tiles bias_loss_launchers.cuh
  "problem.wide_head_gradient = aligned(call.head_gradient, 16);"
  "problem.wide_head_gradient = aligned(call.gradient, 16);"
  "misaligned access: .* of head gradient")
lnl_fault(alignment_of_the_other_gradient_in_rows bias_loss_launchers.cuh
  "problem.wide_head_gradient = same_phase(call.logits, call.head_gradient);"
  "problem.wide_head_gradient = same_phase(call.logits, call.gradient);"
  "misaligned access: .* of head gradient")
lnl_fault(alignment_of_the_other_gradient_in_sites bias_loss_plan.cuh
  "aligned(call.head_gradient, bytes)"
  "aligned(call.gradient, bytes)"
  "misaligned access: .* of head gradient")
lnl_fault(sum_without_compensation bias_loss_reduce.cuh
  "lost = (next - value) - corrected;"
  ""
  " equal .*entropy\\[")
lnl_fault(fold_of_one_turn_of_values bias_loss_reduce.cuh
  "part < problem.blocks; part += groups"
  "part < problem.blocks; part += problem.blocks"
  "many-blocks.*loss\\[")
lnl_fault(second_turn_of_no_block bias_loss_reduce.cuh
  "any += turns.flags[block];"
  ""
  "ignored=.*gradient\\[")
lnl_fault(second_turn_of_flagged_blocks_alone bias_loss_reduce.cuh
  "block < turns.blocks; block += blockDim.x"
  "block == block_of_grid(); block = turns.blocks"
  "ignored=.*gradient\\[")
lnl_fault(ignored_labels_not_counted bias_loss_reduce.cuh
  "++ignored;"
  ""
  "ignored=.*denominators\\[")
lnl_fault(weights_not_counted bias_loss_reduce.cuh
  "weight.add(label.is_class() ? problem.weight[label.value] : A(1));"
  "weight.add(A(1));"
  "weight.*denominators\\[")
lnl_fault(missing_syncthreads_before_own_denominators bias_loss_reduce.cuh
  "__syncthreads();
  denominators = own - 2 * first_head;"
  "denominators = own - 2 * first_head;"
  "race: |never written")
lnl_fault(missing_syncthreads_before_columns_are_added bias_loss_reduce.cuh
  "__syncthreads();
    if (thread < columns) {"
  "if (thread < columns) {"
  "race: |never written")
lnl_fault(missing_syncthreads_before_denominators bias_loss_reduce.cuh
  "__syncthreads();
    if (thread < here) {"
  "if (thread < here) {"
  "race: |never written")
lnl_fault(missing_syncthreads_before_terms bias_loss_reduce.cuh
  "__syncthreads();
    if (thread < kTerms) {"
  "if (thread < kTerms) {"
  "race: |never written")
lnl_linear_fault(linear_fold_of_one_turn_of_denominators bias_loss_reduce.cuh
  "block < problem.blocks; block += kWarp"
  "block < problem.blocks; block += problem.blocks"
  "many-blocks.*denominators\\[")
lnl_fault(wrong_shuffle_mask bias_loss_reduce.cuh
  "kWholeWarp = 0xffffffffu"
  "kWholeWarp = 0x0fffffffu"
  "without its caller in the mask|its mask does not name")
lnl_fault(exited_lane_in_shuffle bias_loss_rows.cuh
  "sum_sites_of_lanes(sums, lanes);"
  "if (lane == 1) return;
    sum_sites_of_lanes(sums, lanes);"
  "lane that has exited")
lnl_fault(divergent_barrier bias_loss_reduce.cuh
  "__syncthreads();
  if (owner) {"
  "if (threadIdx.x >= 32) __syncthreads();
  if (owner) {"
  "divergent barrier")
lnl_fault(unwritten_output bias_loss_rows.cuh
  "store_window(to, element, count, wide, values);"
  "if (element + kWide<T> < count) store_window(to, element, count, wide, values);"
  "unwritten output")
lnl_fault(write_race_across_blocks bias_loss_reduce.cuh
  "(std::int64_t(blockIdx.x) * problem.heads + head_offset + head) * kPartials"
  "(head_offset + head) * kPartials"
  "race across blocks")
lnl_large_fault(offset_of_32_bits bias_loss_large.cuh
  "sites.store(problem.gradient, c * stride, gradient);"
  "sites.store(problem.gradient, static_cast<int>(c * stride), gradient);"
  "FAILED sites_large .*gradient\\[")
# Another host thread's launch may come between the two steps.
lnl_fault(shared_memory_of_this_call_alone bias_loss_launchers.cuh
  "cudaFuncAttributeMaxDynamicSharedMemorySize, most)"
  "cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(needed))"
  "less than the device's most")

lnl_linear_fault(linear_missing_syncthreads_before_read linear_bias_loss_kernels.cuh
  "__syncthreads();
    if (head < problem.loss.heads && row < here) {"
  "if (head < problem.loss.heads && row < here) {"
  "race: |never written")
lnl_linear_fault(linear_missing_syncthreads_before_reuse linear_bias_loss_kernels.cuh
  "__syncthreads();  // the next tile overwrites this one"
  ""
  "race: ")
lnl_linear_fault(linear_out_of_bounds_tail linear_bias_loss_tiles.cuh
  "if (r >= rows) break;
        const T* row"
  "const T* row"
  "out of bounds")
lnl_linear_fault(linear_unwritten_partial linear_bias_loss_kernels.cuh
  "for (int d = lane; d < problem.width; d += kWarp)"
  "for (int d = lane; d + 1 < problem.width; d += kWarp)"
  "never written")
lnl_linear_fault(linear_write_race_across_blocks linear_bias_loss_kernels.cuh
  "std::int64_t(blockIdx.x) * problem.columns * (problem.width + 1)"
  "0"
  "race across blocks")
lnl_linear_fault(linear_shared_memory_of_this_call_alone linear_bias_loss_launchers.cuh
  "plan.loss.most_shared = device.shared_memory;"
  "plan.loss.most_shared = 48 * 1024 + 256;"
  "less than the device's most")
lnl_linear_fault(linear_out_of_bounds_by_one linear_bias_loss_tiles.cuh
  "if (element < problem.width) packs"
  "if (element <= problem.width) packs"
  "out of bounds")
lnl_linear_fault(linear_misaligned_vector linear_bias_loss_launchers.cuh
  "const bool whole = call.width % kWide<T> == 0;"
  "const bool whole = call.width > kWide<T>;"
  "misaligned access")
lnl_linear_fault(linear_wrong_shuffle_mask linear_bias_loss_tiles.cuh
  "values[i] = kept + __shfl_xor_sync(kWholeWarp, given, kOther);"
  "values[i] = kept + __shfl_xor_sync(0x0fffffffu, given, kOther);"
  "without its caller in the mask|its mask does not name")
lnl_linear_fault(linear_exited_lane_in_shuffle linear_bias_loss_kernels.cuh
  "prepare_block(problem, memory);
  __syncthreads();"
  "prepare_block(problem, memory);
  __syncthreads();
  if (threadIdx.x == 1) return;"
  "lane that has exited")
lnl_linear_fault(linear_divergent_barrier linear_bias_loss_kernels.cuh
  "__syncthreads();
    if (problem.head_partials != nullptr) {"
  "__syncthreads();
    if (threadIdx.x < 32) __syncthreads();
    if (problem.head_partials != nullptr) {"
  "divergent barrier")
lnl_linear_fault(linear_unwritten_output linear_bias_loss_tiles.cuh
  "T* row = problem.features_gradient + (first_row + r) * problem.width;"
  "if (chunk > 0 && chunk + 1 == problem.chunks) break;
    T* row = problem.features_gradient + (first_row + r) * problem.width;"
  "unwritten output")
