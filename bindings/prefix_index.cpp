#include "bindings.h"

void bind_prefix_index(nanobind::module_&) {}
