// tiermem._core: the native core as Python sees it. Argument conversion and error mapping only.
#include "bindings.h"

NB_MODULE(_core, module) {
  module.doc() = "Native core of tiermem: page table, prefix index, file I/O and checksum.";
  bind_page_table(module);
  bind_prefix_index(module);
  bind_io(module);
}
