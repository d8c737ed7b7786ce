import torch

torch.set_num_threads(1)  # the matrices here are small: waking a second thread costs more than it saves
