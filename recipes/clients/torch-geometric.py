# /// script
# dependencies = ["torch-geometric"]
# ///
"""torch-geometric: graphs as points, batched by its LightningDataset, and the nodes of one graph as points."""

import torch
from clients import Steps, compare, fit
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torch_geometric.data import Data
from torch_geometric.data.lightning import LightningDataset, LightningNodeData
from torch_geometric.nn import GCN, global_mean_pool


def graph(label, classes=3):
    """A ring with features that tell its class, badly."""
    nodes = int(torch.randint(4, 10, ()))
    ring = torch.arange(nodes)
    edges = torch.stack([torch.cat([ring, ring.roll(1)]), torch.cat([ring.roll(1), ring])])
    x = torch.randn(nodes, 8)
    x[:, label % classes] += 0.5
    return Data(x=x, edge_index=edges, y=torch.tensor([label % classes]))


class Graphs(Steps):
    """A graph network, with a class for each graph."""

    def __init__(self):
        super().__init__()
        self.network, self.head = GCN(8, 16, num_layers=2), nn.Linear(16, 3)

    def forward(self, batch):
        return self.head(global_mean_pool(self.network(batch.x, batch.edge_index), batch.batch))

    def loss(self, batch, split):
        return cross_entropy(self(batch), batch.y)


class Nodes(Graphs):
    """A graph network, with a class for each node."""

    def forward(self, batch):
        return self.head(self.network(batch.x, batch.edge_index))

    def loss(self, batch, split):
        nodes = batch[f"{split}_mask"]
        return cross_entropy(self(batch)[nodes], batch.y[nodes])


def graphs(callbacks):
    sets = ([graph(label) for label in range(count)] for count in (200, 100, 100))
    return fit(Graphs(), LightningDataset(*sets, batch_size=32), callbacks, max_epochs=10)


def nodes(callbacks):
    return fit(Nodes(), LightningNodeData(network, loader="full", batch_size=1), callbacks, max_epochs=40)


torch.manual_seed(0)
labels = torch.arange(300) % 3
near = torch.randint(100, (2, 900)) * 3  # edges mostly join nodes of one class
edges = near + torch.randint(3, (900,)) + torch.stack([torch.zeros(900), torch.rand(900) < 0.2]).long()
network = Data(x=torch.randn(300, 8), edge_index=edges % 300, y=labels)
network.x[torch.arange(300), labels] += 0.5
order = torch.randperm(300)
for name, part in zip(("train_mask", "val_mask", "test_mask"), order.chunk(3), strict=True):
    network[name] = torch.zeros(300, dtype=torch.bool).index_fill(0, part, True)

seen, unseen = (DataLoader(TensorDataset(part, labels[part]), batch_size=50) for part in order.chunk(3)[:2])

compare("torch-geometric", "GCN, graphs", graphs)
compare(
    "torch-geometric",
    "GCN, nodes of one graph",
    nodes,
    train_loader=seen,
    calibration_loader=unseen,
    forward=lambda module, number: module(network)[number],
)
