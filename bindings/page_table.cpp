#include "bindings.h"

void bind_page_table(nanobind::module_&) {}
