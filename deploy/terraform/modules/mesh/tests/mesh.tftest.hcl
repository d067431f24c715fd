# The provider tls calls nobody, so it is the real one.

variables {
  domain = "mesh.internal"
  regions = {
    us-east-1 = "us:50051"
    eu-west-2 = "eu:50051"
  }
}

run "each_region_is_told_of_the_others_and_gets_a_certificate_of_one_authority" {
  assert {
    condition     = output.regions["us-east-1"].peers == ["eu:50051"]
    error_message = "A region's peers are the other regions."
  }
  assert {
    condition     = output.regions["us-east-1"].peer_names == "ratelimit.{region}.mesh.internal"
    error_message = "A certificate is believed for its own region."
  }
  assert {
    condition     = tls_cert_request.region["eu-west-2"].dns_names == tolist(["ratelimit.eu-west-2.mesh.internal"])
    error_message = "That is the name in it."
  }
  assert {
    condition     = length(distinct([for region in output.certificates : region.ca])) == 1
    error_message = "All have the same authority."
  }
  assert {
    condition     = length(distinct([for region in output.certificates : region.key])) == 2
    error_message = "Each has a key of its own."
  }
}

run "a_certificate_is_made_anew_in_the_last_third_of_its_life" {
  command = plan
  variables {
    certificate_hours = 300
  }
  assert {
    condition     = tls_locally_signed_cert.region["eu-west-2"].early_renewal_hours == 100
    error_message = "A hundred hours before it ends."
  }
}
