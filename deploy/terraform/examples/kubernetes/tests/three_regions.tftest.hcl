mock_provider "helm" {}
mock_provider "kubernetes" {}

run "three_regions_know_each_other" {
  assert {
    condition     = keys(output.addresses) == ["ap-southeast-1", "eu-west-2", "us-east-1"]
    error_message = "Three regions."
  }
  assert {
    condition = module.mesh.regions["us-east-1"].peers == [
      "rl-ratelimit-sidecar-mesh.ratelimit-ap-southeast-1.svc:50051",
      "rl-ratelimit-sidecar-mesh.ratelimit-eu-west-2.svc:50051",
    ]
    error_message = "Each has the others as peers."
  }
}

run "an_edge_is_made_when_there_is_a_token_for_it" {
  variables {
    edge_token = "0123456789abcdef0123456789abcdef"
  }
  assert {
    condition     = module.edge[0].service == "ratelimit-ap-southeast-1/ratelimit-edge"
    error_message = "One, before the first region."
  }
}
