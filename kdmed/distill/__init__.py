"The modules of distillation; what users import is in `kdmed.kd`"
