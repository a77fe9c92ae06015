// Every part of the module tiermem._core: one function a file, called once by module.cpp.
#pragma once

#include <nanobind/nanobind.h>

void bind_page_table(nanobind::module_& module);
void bind_prefix_index(nanobind::module_& module);
void bind_io(nanobind::module_& module);
void bind_raw_disk(nanobind::module_& module);
void bind_fault_ops(nanobind::module_& module);
void bind_checksum(nanobind::module_& module);
void bind_copies(nanobind::module_& module);
void bind_kernel_launch(nanobind::module_& module);
void bind_cpu_attention(nanobind::module_& module);
void bind_attention_queue(nanobind::module_& module);
void bind_lmdb_file(nanobind::module_& module);
