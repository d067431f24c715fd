# Who finds whom, and by which certificate: an authority of the mesh's own, and one certificate a region.

terraform {
  required_version = ">= 1.7"
  required_providers {
    tls = { source = "hashicorp/tls", version = "~> 4.0" }
  }
}

variable "regions" {
  description = "The address, host:port, that has all sidecars of each region."
  type        = map(string)
}

variable "domain" {
  description = "Names in the certificates end with it."
  type        = string
}

variable "authority_hours" {
  type    = number
  default = 10 * 8760
}

variable "certificate_hours" {
  description = "A certificate is made anew by an apply in the last third of this."
  type        = number
  default     = 2160
}

resource "tls_private_key" "authority" {
  algorithm   = "ECDSA"
  ecdsa_curve = "P256"
}

resource "tls_self_signed_cert" "authority" {
  private_key_pem       = tls_private_key.authority.private_key_pem
  is_ca_certificate     = true
  validity_period_hours = var.authority_hours
  allowed_uses          = ["cert_signing", "crl_signing"]
  subject {
    common_name = "rate limit mesh ${var.domain}"
  }
}

resource "tls_private_key" "region" {
  for_each    = var.regions
  algorithm   = "ECDSA"
  ecdsa_curve = "P256"
}

resource "tls_cert_request" "region" {
  for_each        = var.regions
  private_key_pem = tls_private_key.region[each.key].private_key_pem
  dns_names       = ["ratelimit.${each.key}.${var.domain}"]
  subject {
    common_name = each.key
  }
}

resource "tls_locally_signed_cert" "region" {
  for_each              = var.regions
  cert_request_pem      = tls_cert_request.region[each.key].cert_request_pem
  ca_private_key_pem    = tls_private_key.authority.private_key_pem
  ca_cert_pem           = tls_self_signed_cert.authority.cert_pem
  validity_period_hours = var.certificate_hours
  early_renewal_hours   = floor(var.certificate_hours / 3)
  allowed_uses          = ["digital_signature", "key_encipherment", "server_auth", "client_auth"]
}

output "regions" {
  description = "For each region what its region module takes as mesh."
  value = {
    for name in keys(var.regions) : name => {
      peers      = [for other, address in var.regions : address if other != name]
      peer_names = "ratelimit.{region}.${var.domain}"
    }
  }
}

output "certificates" {
  description = "For each region what its region module takes as certificate."
  sensitive   = true
  value = {
    for name in keys(var.regions) : name => {
      certificate = tls_locally_signed_cert.region[name].cert_pem
      key         = tls_private_key.region[name].private_key_pem_pkcs8
      ca          = tls_self_signed_cert.authority.cert_pem
    }
  }
}
